import com.pixelmed.validate.DicomSRValidator;

/** Validates many structured reports with one validator: compiling its style sheets takes most of the time. */
public class PixelmedBatch {
    public static void main(String[] files) throws Exception {
        DicomSRValidator validator = new DicomSRValidator();
        for (String file : files) {
            System.out.println("@@ " + file);
            // the options of the validator's own main program when none is given
            System.out.print(validator.validate(file, false, true, false, false, false));
            System.out.println();
        }
    }
}
