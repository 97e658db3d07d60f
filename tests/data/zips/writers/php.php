<?php
foreach (['php' => null, 'php-zstd' => 93, 'refused-php-bzip2' => 12] as $name => $method) {
    $zip = new ZipArchive;
    $zip->open(getenv('out') . "/$name.zip", ZipArchive::CREATE);
    $zip->addEmptyDir('lib/empty');
    foreach (['Acme.Zip.nuspec', 'lib/a.dll', 'nothing'] as $file) {
        $zip->addFile($file, $file);
        if ($method && !$zip->setCompressionName($file, $method)) {
            continue 2;
        }
    }
    $zip->close();
}
