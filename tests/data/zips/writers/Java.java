import java.io.FileOutputStream;
import java.nio.file.*;
import java.nio.file.attribute.FileTime;
import java.util.Map;
import java.util.zip.*;

public class Java {
    static final String[] FILES = {"Acme.Zip.nuspec", "lib/", "lib/a.dll", "nothing"};

    public static void main(String[] arguments) throws Exception {
        String out = arguments[0];
        try (var zip = new ZipOutputStream(new FileOutputStream(out + "/java.zip"))) {
            zip.setComment("hello");
            for (String name : FILES) write(zip, new ZipEntry(name));
        }
        try (var zip = new ZipOutputStream(new FileOutputStream(out + "/java-extra.zip"))) {
            for (String name : FILES) {
                ZipEntry entry = new ZipEntry(name);
                entry.setExtra(new byte[] {1, 2, 0, 0});
                entry.setLastModifiedTime(FileTime.fromMillis(1_600_000_000_000L));
                entry.setComment("a part");
                write(zip, entry);
            }
        }
        Path path = Path.of(out, "java-zipfs.zip");
        Files.deleteIfExists(path);
        try (FileSystem files = FileSystems.newFileSystem(path, Map.of("create", "true"))) {
            Files.createDirectory(files.getPath("lib"));
            for (String name : FILES) if (!name.endsWith("/")) Files.copy(Path.of(name), files.getPath(name));
        }
    }

    static void write(ZipOutputStream zip, ZipEntry entry) throws Exception {
        zip.putNextEntry(entry);
        if (!entry.isDirectory()) zip.write(Files.readAllBytes(Path.of(entry.getName())));
        zip.closeEntry();
    }
}
