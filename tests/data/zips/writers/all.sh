#!/bin/bash
# Makes a zip of one small tree with each writer that is here, into the folder that is named. Read ../README.md first.
# Usage: all.sh FOLDER; what a writer says goes to FOLDER/make.log
set -u
here=$(cd "$(dirname "$0")" && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
tree=$out/tree
export out tree
mkdir -p "$tree/lib/empty"
cd "$tree" || exit 1
printf '%s' '<package><metadata><id>Acme.Zip</id><version>1.0.0</version><authors>a</authors><description>d</description></metadata></package>' >Acme.Zip.nuspec
printf 'some text, %.0s' $(seq 50) >lib/a.dll
printf '#!/bin/sh\n' >'lib/run me'
: >nothing
chmod 755 'lib/run me'
find . -exec touch -d '2026-01-02 03:04:06' {} +
all=(Acme.Zip.nuspec lib nothing)
files=(Acme.Zip.nuspec lib/a.dll nothing)
exec 2>"$out/make.log"

try() {
    name=$1
    shift
    command -v "$1" >/dev/null && ! "$@" >/dev/null && echo "failed: $name" >&2
}

# Java
try jar jar cfM "$out/jar.zip" "${all[@]}"
try jar jar cf "$out/jar-manifest.zip" "${all[@]}"
try jar jar cfM0 "$out/jar-stored.zip" "${all[@]}"
cp "$out/jar.zip" "$out/jar-updated.zip" && jar ufM "$out/jar-updated.zip" nothing
try java java "$here/Java.java" "$out"
try fastjar fastjar cfM "$out/fastjar.zip" "${all[@]}"
fastjar cM "${all[@]}" >"$out/fastjar-stream.zip"

# Info-ZIP
try zip zip -qr "$out/infozip.zip" "${all[@]}"
zip -qr - "${all[@]}" >"$out/infozip-stdout.zip"
zip -qr - "${all[@]}" | cat >"$out/infozip-pipe.zip"
zip -qr0 - "${all[@]}" | cat >"$out/infozip-pipe-stored.zip"
zip -qr -fz- - "${all[@]}" | cat >"$out/infozip-pipe-32.zip"
try zip zip -qr -fd "$out/infozip-descriptors.zip" "${all[@]}"
try zip zip -qr -fz "$out/infozip-zip64.zip" "${all[@]}"
cp "$out/infozip.zip" "$out/infozip-updated.zip" && zip -q "$out/infozip-updated.zip" lib/a.dll
echo hello | zip -qrz "$out/infozip-comment.zip" "${all[@]}" >/dev/null

# 7-Zip
for method in Copy Deflate; do try 7z 7z a -tzip -mm=$method "$out/7z-${method,,}.zip" "${all[@]}"; done
try 7z 7z a -tzip -mcu=on -mtc=on -mta=on "$out/7z-times.zip" "${all[@]}"
for method in Deflate64 BZip2 LZMA PPMd; do try 7z 7z a -tzip -mm=$method "$out/refused-$method.zip" "${all[@]}"; done
try 7z 7z a -tzip -px -mem=AES256 "$out/refused-encrypted.zip" "${all[@]}"

# libarchive, minizip, libzip, AdvanceCOMP
try bsdtar bsdtar --format zip -cf "$out/bsdtar.zip" "${all[@]}"
bsdtar --format zip -cf - "${all[@]}" | cat >"$out/bsdtar-pipe.zip"
bsdtar --format zip --options zip:compression=store -cf - "${all[@]}" | cat >"$out/bsdtar-pipe-stored.zip"
bsdtar --format zip --options zip:zip64 -cf - "${all[@]}" | cat >"$out/bsdtar-zip64.zip"
try minizip minizip -o "$out/minizip.zip" "${files[@]}"
try zipmerge zipmerge "$out/zipmerge.zip" "$out/jar.zip"
cp "$out/infozip.zip" "$out/advzip.zip" && advzip -qz "$out/advzip.zip"

# Perl, Ruby, PHP, Go, Node, Python
try perl perl "$here/perl.pl"
try ruby ruby "$here/ruby.rb"
try php php "$here/php.php"
streamzip -member-name Acme.Zip.nuspec <Acme.Zip.nuspec >"$out/streamzip.zip"
streamzip -zip64 -stream -member-name Acme.Zip.nuspec <Acme.Zip.nuspec | cat >"$out/streamzip-zip64.zip"
go run "$here/go.go"
try node node "$here/node.mjs"
"${PYTHON:-python3}" "$here/python"
rm -r "$tree"
find "$out" -name '*.zip' -size 0 -delete
