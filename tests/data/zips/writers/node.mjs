// Needs: archiver@7 jszip yazl adm-zip fflate @zip.js/zip.js client-zip pizzip do-not-zip uzip zip-lib littlezipper node-native-zip zip-local
import fs from 'fs'
import path from 'path'
import { createRequire } from 'module'

const require = createRequire(path.join(process.env.MODULES ?? process.cwd(), 'x.js'))
const out = process.env.out
const names = ['Acme.Zip.nuspec', 'lib/a.dll', 'lib/run me', 'nothing']
const read = name => fs.readFileSync(path.join(process.env.tree, name))
const bytes = name => new Uint8Array(read(name))

async function make(name, write) {
  try {
    const data = await write()
    if (data) fs.writeFileSync(`${out}/node-${name}.zip`, data)
  } catch (error) { console.error('failed:', name, error.message) }
}

function collected(stream) {
  const pieces = []
  return new Promise((resolve, reject) => stream.on('data', piece => pieces.push(piece))
    .on('end', () => resolve(Buffer.concat(pieces))).on('error', reject))
}

const archiver = require('archiver')
for (const [name, options, streamed] of [['', {}, false], ['-stream', {}, true], ['-stored', { store: true }, true],
  ['-zip64', { forceZip64: true }, true], ['-comment', { comment: 'hello', zlib: { level: 9 } }, false]]) {
  await make(`archiver${name}`, () => {
    const zip = archiver('zip', options)
    const all = collected(zip)
    zip.append('', { name: 'lib/empty/' })
    for (const file of names) zip.append(streamed ? fs.createReadStream(file) : read(file), { name: file })
    zip.finalize()
    return all
  })
}
await make('archiver-folder', () => {
  const zip = archiver('zip')
  const all = collected(zip)
  zip.directory(process.env.tree, false).finalize()
  return all
})

const JSZip = require('jszip')
for (const [name, options] of [['', {}], ['-deflate', { compression: 'DEFLATE' }],
  ['-stream', { compression: 'DEFLATE', streamFiles: true }], ['-stored-stream', { streamFiles: true }],
  ['-unix', { platform: 'UNIX', compression: 'DEFLATE', comment: 'hello' }]]) {
  await make(`jszip${name}`, () => {
    const zip = new JSZip()
    zip.folder('lib/empty')
    for (const file of names) zip.file(file, read(file))
    return zip.generateAsync({ type: 'nodebuffer', ...options })
  })
}

const yazl = require('yazl')
for (const [name, options, streamed] of [['', {}, false], ['-stream', {}, true],
  ['-zip64', { forceZip64Format: true }, true], ['-stored', { compress: false }, true]]) {
  await make(`yazl${name}`, () => {
    const zip = new yazl.ZipFile()
    zip.addEmptyDirectory('lib/empty')
    for (const file of names) {
      if (streamed) zip.addReadStream(fs.createReadStream(file), file, options)
      else zip.addFile(file, file, options)
    }
    zip.end({ forceZip64Format: !!options.forceZip64Format, comment: 'hello' })
    return collected(zip.outputStream)
  })
}

const AdmZip = require('adm-zip')
await make('adm-zip', () => {
  const zip = new AdmZip()
  zip.addFile('lib/empty/', Buffer.alloc(0))
  for (const file of names) zip.addFile(file, read(file))
  return zip.toBuffer()
})
await make('adm-zip-folder', () => {
  const zip = new AdmZip()
  zip.addLocalFolder(process.env.tree)
  return zip.toBuffer()
})
for (const source of ['jar', 'go', 'infozip-pipe', 'node-archiver-stream']) {
  await make(`adm-zip-of-${source}`, () => {
    const zip = new AdmZip(`${out}/${source}.zip`)
    zip.updateFile('Acme.Zip.nuspec', read('Acme.Zip.nuspec'))
    return zip.toBuffer()
  })
}

const fflate = require('fflate')
await make('fflate', () => fflate.zipSync(Object.fromEntries(names.map(file => [file, bytes(file)]))))
await make('fflate-nested', () => fflate.zipSync({
  'Acme.Zip.nuspec': bytes('Acme.Zip.nuspec'),
  lib: { 'a.dll': [bytes('lib/a.dll'), { level: 0, os: 3, attrs: 0o100644 << 16 }], empty: {} },
}))
for (const kind of ['ZipDeflate', 'ZipPassThrough', 'AsyncZipDeflate']) {
  await make(`fflate-${kind}`, () => new Promise((resolve, reject) => {
    const pieces = []
    const zip = new fflate.Zip((error, piece, last) => {
      if (error) reject(error)
      pieces.push(Buffer.from(piece))
      if (last) resolve(Buffer.concat(pieces))
    })
    for (const file of names) {
      const part = new fflate[kind](file)
      zip.add(part)
      part.push(bytes(file), true)
    }
    zip.end()
  }))
}

const zipjs = require('@zip.js/zip.js')
for (const [name, options] of [['', {}], ['-zip64', { zip64: true }], ['-descriptor', { dataDescriptor: true }],
  ['-unsigned-descriptor', { dataDescriptor: true, dataDescriptorSignature: false }],
  ['-no-descriptor', { dataDescriptor: false }], ['-stored', { level: 0 }]]) {
  await make(`zipjs${name}`, async () => {
    const zip = new zipjs.ZipWriter(new zipjs.Uint8ArrayWriter(), { useWebWorkers: false, ...options })
    await zip.add('lib/empty/', undefined, { directory: true })
    for (const file of names) await zip.add(file, new zipjs.Uint8ArrayReader(bytes(file)))
    return zip.close()
  })
}

const { downloadZip } = await import(require.resolve('client-zip'))
await make('client-zip', async () => Buffer.from(
  await downloadZip(names.map(name => ({ name, input: read(name), lastModified: new Date(0) }))).arrayBuffer()))
const PizZip = require('pizzip')
await make('pizzip', () => {
  const zip = new PizZip()
  for (const file of names) zip.file(file, read(file))
  return zip.generate({ type: 'nodebuffer', compression: 'DEFLATE' })
})
await make('do-not-zip', () => Buffer.from(
  require('do-not-zip').toBuffer(names.map(file => ({ path: file, data: read(file) })))))
await make('uzip', () => Buffer.from(require('uzip').encode(Object.fromEntries(names.map(file => [file, bytes(file)])))))
await make('zip-lib', () => require('zip-lib').archiveFolder(process.env.tree, `${out}/node-zip-lib.zip`))
await make('littlezipper', () => require('littlezipper').createZip(names.map(file => ({ path: file, data: read(file) }))))
await make('native-zip', () => {
  const zip = new (require('node-native-zip'))()
  for (const file of names) zip.add(file, read(file))
  return zip.toBuffer()
})
await make('zip-local', () => require('zip-local').sync.zip(process.env.tree).compress().memory())
