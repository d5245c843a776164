#!/usr/bin/env bash
# Install the Debian packages that the tests talk to, or say in one line what is missing.
set -euo pipefail

declare -A provided_by=(
  [storescu]=dcmtk
  [ojph_compress]=openjph-tools
  [Orthanc]=orthanc
  [dciodvfy]=dicom3tools
  [strace]=strace
  [gcc]=gcc
  [javac]=default-jdk-headless
  [chromium]=chromium
  [npm]=npm
  [pdfinfo]=poppler-utils
  [promtool]=prometheus
  [systemd-analyze]=systemd
)
missing=()
for command in "${!provided_by[@]}"; do
  command -v "$command" >/dev/null || [ -x "/usr/sbin/$command" ] || missing+=("${provided_by[$command]}")
done
[ -e /usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc ] || missing+=(fonts-noto-cjk)
[ -e /usr/include/dlfcn.h ] || missing+=(libc6-dev)
[ -e /usr/share/java/pixelmed.jar ] || missing+=(libpixelmed-java)
[ -e /usr/share/orthanc/plugins/libOrthancDicomWeb.so ] || missing+=(orthanc-dicomweb)
[ -e /usr/share/orthanc/plugins/libOrthancWebViewer.so ] || missing+=(orthanc-webviewer)
compgen -G "/usr/lib/postgresql/*/bin/initdb" >/dev/null || missing+=(postgresql)
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" = 0 ]; then
  as_root=()
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  as_root=(sudo -n)
else
  echo "missing Debian packages: ${missing[*]}; install them with: apt-get install ${missing[*]} (tests that need them are skipped until then)"
  exit 0
fi
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
