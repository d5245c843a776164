import com.pixelmed.validate.DicomSRValidator;
import javax.xml.transform.ErrorListener;
import javax.xml.transform.Source;
import javax.xml.transform.Templates;
import javax.xml.transform.Transformer;
import javax.xml.transform.TransformerConfigurationException;
import javax.xml.transform.TransformerFactory;
import javax.xml.transform.URIResolver;

/** Validates many structured reports with one validator: compiling its style sheets takes most of the time. */
public class PixelmedBatch {
    public static void main(String[] files) throws Exception {
        Thread.currentThread().setContextClassLoader(PixelmedBatch.class.getClassLoader());
        System.setProperty("javax.xml.transform.TransformerFactory", WithAddress.class.getName());
        DicomSRValidator validator = new DicomSRValidator();
        for (String file : files) {
            System.out.println("@@ " + file);
            // the options of the validator's own main program when none is given
            System.out.print(validator.validate(file, false, true, false, false, false));
            System.out.println();
        }
    }

    /**
     * Java's own transformers, but the first style sheet knows its address.
     *
     * <p>It looks every content item's concept up in document('DicomContextGroupsSource.xml'). Without an address and
     * through the validator's resolver, that document of 660 kB is read anew for each content item: 14 s a report. With
     * one it is the same file, found beside the style sheet and read once. The second style sheet needs the resolver:
     * it reads what the first one found.
     */
    public static class WithAddress extends TransformerFactory {
        private final TransformerFactory javas = TransformerFactory.newDefaultInstance();
        private URIResolver resolver;
        private boolean first = true;

        @Override
        public Transformer newTransformer(Source source) throws TransformerConfigurationException {
            if (first) {
                first = false;
                source.setSystemId(DicomSRValidator.class.getResource("DicomSRDescriptionsCompiled.xsl").toString());
                return javas.newTransformer(source);
            }
            Transformer made = javas.newTransformer(source);
            made.setURIResolver(resolver);
            return made;
        }

        @Override
        public void setURIResolver(URIResolver given) {
            resolver = given;
        }

        @Override
        public URIResolver getURIResolver() {
            return resolver;
        }

        @Override
        public Transformer newTransformer() throws TransformerConfigurationException {
            return javas.newTransformer();
        }

        @Override
        public Templates newTemplates(Source source) throws TransformerConfigurationException {
            return javas.newTemplates(source);
        }

        @Override
        public Source getAssociatedStylesheet(Source source, String media, String title, String charset)
                throws TransformerConfigurationException {
            return javas.getAssociatedStylesheet(source, media, title, charset);
        }

        @Override
        public void setFeature(String name, boolean value) throws TransformerConfigurationException {
            javas.setFeature(name, value);
        }

        @Override
        public boolean getFeature(String name) {
            return javas.getFeature(name);
        }

        @Override
        public void setAttribute(String name, Object value) {
            javas.setAttribute(name, value);
        }

        @Override
        public Object getAttribute(String name) {
            return javas.getAttribute(name);
        }

        @Override
        public void setErrorListener(ErrorListener listener) {
            javas.setErrorListener(listener);
        }

        @Override
        public ErrorListener getErrorListener() {
            return javas.getErrorListener();
        }
    }
}
