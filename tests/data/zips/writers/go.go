package main

import (
	"archive/zip"
	"os"
	"strings"
)

func write(path string, method uint16, fromFile bool) {
	file, _ := os.Create(os.Getenv("out") + "/" + path)
	writer := zip.NewWriter(file)
	for _, name := range []string{"Acme.Zip.nuspec", "lib/", "lib/a.dll", "nothing"} {
		header := &zip.FileHeader{}
		if fromFile {
			info, _ := os.Stat(name)
			header, _ = zip.FileInfoHeader(info)
		}
		header.Name, header.Method = name, method
		part, _ := writer.CreateHeader(header)
		if !strings.HasSuffix(name, "/") {
			data, _ := os.ReadFile(name)
			part.Write(data)
		}
	}
	writer.Close()
	file.Close()
}

func main() {
	write("go.zip", zip.Deflate, false)
	write("go-stored.zip", zip.Store, false)
	write("go-header.zip", zip.Deflate, true)
}
