use Archive::Zip qw(:CONSTANTS);
use IO::Compress::Zip qw(zip :constants);

my $out = $ENV{out};
my @files = ("Acme.Zip.nuspec", "lib/a.dll", "nothing");
my $zip = Archive::Zip->new();
$zip->addTree('.', '');
$zip->writeToFileNamed("$out/perl.zip");
open my $pipe, "|-", "cat > $out/perl-pipe.zip";
$zip = Archive::Zip->new();
$zip->addFile($_) for @files;
$zip->writeToFileHandle($pipe, 0);
close $pipe;
zip \@files => "$out/perl-io.zip";
zip \@files => "$out/perl-io-stream.zip", Stream => 1;
zip \@files => "$out/perl-io-stored-stream.zip", Stream => 1, Method => ZIP_CM_STORE;
zip \@files => "$out/perl-io-zip64.zip", Stream => 1, Zip64 => 1;
