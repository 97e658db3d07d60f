require 'zip'

out = ENV['out']
names = ['Acme.Zip.nuspec', 'lib/', 'lib/a.dll', 'nothing']
write = lambda do |zip|
  names.each do |name|
    zip.put_next_entry(name)
    zip.write(File.binread(name)) unless name.end_with?('/')
  end
end
Zip::File.open("#{out}/ruby-file.zip", true) { |zip| names.each { |name| zip.add(name.chomp('/'), name) } }
Zip::OutputStream.open("#{out}/ruby-stream.zip", &write)
File.binwrite("#{out}/ruby-buffer.zip", Zip::OutputStream.write_buffer(&write).string)
Zip.write_zip64_support = true
Zip::OutputStream.open("#{out}/ruby-zip64.zip", &write)
