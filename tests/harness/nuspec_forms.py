"""Nuspecs as people have them: written by hand, by old tools, by scripts, in the encodings of their editors.

Which of them NuGet restores was told by dotnet (SDK 10.0.401, NuGet 7.9.0): the long form of `test_nuspec.py` asks it again.
"""

from __future__ import annotations

from typing import Final

ID: Final = "Acme.Form"
VERSION: Final = "1.0.0"
_XSD: Final = "http://schemas.microsoft.com/packaging/{}/nuspec.xsd"
_ATTRIBUTES: Final = "".join(f' a{n}="b"' for n in range(60))
_NOW: Final = _XSD.format("2013/05")


def form(
    inner: str = "",
    *,
    id: str = f"<id>{ID}</id>",
    version: str = f"<version>{VERSION}</version>",
    head: str = '<?xml version="1.0" encoding="utf-8"?>\n',
    package: str = f' xmlns="{_NOW}"',
    metadata: str = "",
    about: str = "<authors>Ann</authors><description>Grüße</description>",
    tail: str = "",
) -> str:
    """The text of a nuspec; each argument is markup."""
    return f"{head}<package{package}><metadata{metadata}>{id}{version}{about}{inner}</metadata>{tail}</package>"


def _said(encoding: str) -> str:
    return f'<?xml version="1.0" encoding="{encoding}"?>\n'


def _dependencies(inner: str) -> str:
    return form(f"<dependencies>{inner}</dependencies>")


_ENCODED: dict[str, bytes] = {
    "utf-8": form().encode(),
    "utf-8 unsaid": form(head="").encode(),
    "utf-8 with a mark": form().encode("utf-8-sig"),
    "utf-8 with a mark, unsaid": form(head="").encode("utf-8-sig"),
    "utf-8 in upper case": form(head=_said("UTF-8")).encode(),
    "utf-8 without its hyphen": form(head=_said("utf8")).encode(),
    "utf-8 declared in single quotes": form(head="<?xml version='1.0' encoding='utf-8' standalone='yes' ?>").encode(),
    "utf-16-le with a mark": b"\xff\xfe" + form(head=_said("utf-16")).encode("utf-16-le"),
    "utf-16-be with a mark": b"\xfe\xff" + form(head=_said("utf-16")).encode("utf-16-be"),
    "utf-16 with a mark, unsaid": b"\xff\xfe" + form(head="").encode("utf-16-le"),
    "utf-16 with a mark, said to be unicode": b"\xff\xfe" + form(head=_said("unicode")).encode("utf-16-le"),
    "utf-16 with a mark, said to be utf-8": b"\xff\xfe" + form().encode("utf-16-le"),
    "utf-16-be with a mark, said to be utf-8": b"\xfe\xff" + form().encode("utf-16-be"),
    "utf-16-le without a mark": form(head=_said("utf-16")).encode("utf-16-le"),
    "utf-16-be without a mark": form(head=_said("utf-16")).encode("utf-16-be"),
    "utf-16-le without a mark, unsaid": form(head="").encode("utf-16-le"),
    "utf-32-le with a mark": b"\xff\xfe\0\0" + form(head=_said("utf-32")).encode("utf-32-le"),
    "utf-32-be with a mark": b"\0\0\xfe\xff" + form(head=_said("utf-32")).encode("utf-32-be"),
    "utf-8 said to be utf-16": form(head=_said("utf-16")).encode(),
    "utf-8 with a mark, said to be utf-16": form(head=_said("utf-16")).encode("utf-8-sig"),
    "utf-8 with a mark, said to be latin": form(head=_said("iso-8859-1")).encode("utf-8-sig"),
    "windows-1252": form(head=_said("windows-1252")).encode("cp1252"),
    "Windows-1252": form(head=_said("Windows-1252")).encode("cp1252"),
    "windows-1250": form(head=_said("windows-1250")).encode("cp1250"),
    "windows-1251": form(
        "<title>Привет</title>", about="<authors>Я</authors><description>d</description>", head=_said("windows-1251")
    ).encode("cp1251"),
    "windows-1252 with undefined bytes": form("<title>\x81\x8d</title>", head=_said("windows-1252")).encode("latin-1"),
    "iso-8859-1": form(head=_said("iso-8859-1")).encode("latin-1"),
    "ISO-8859-1": form(head=_said("ISO-8859-1")).encode("latin-1"),
    "iso-8859-15": form(head=_said("iso-8859-15")).encode("iso-8859-15"),
    "iso-8859-2": form(head=_said("iso-8859-2")).encode("iso-8859-2"),
    "latin1": form(head=_said("latin1")).encode("latin-1"),
    "us-ascii": form(head=_said("us-ascii"), about="<authors>A</authors><description>d</description>").encode("ascii"),
    "ascii": form(head=_said("ascii"), about="<authors>A</authors><description>d</description>").encode("ascii"),
    "us-ascii with other bytes": form(head=_said("us-ascii")).encode("latin-1"),
    "shift_jis": form(
        "<title>日本</title>", head=_said("shift_jis"), about="<authors>A</authors><description>d</description>"
    ).encode("shift_jis"),
    "gb2312": form(
        "<title>中文</title>", head=_said("gb2312"), about="<authors>A</authors><description>d</description>"
    ).encode("gb2312"),
    "gbk": form(
        "<title>中文</title>", head=_said("gbk"), about="<authors>A</authors><description>d</description>"
    ).encode("gbk"),
    "gb18030": form(
        "<title>中文</title>", head=_said("gb18030"), about="<authors>A</authors><description>d</description>"
    ).encode("gb18030"),
    "big5": form(
        "<title>中文</title>", head=_said("big5"), about="<authors>A</authors><description>d</description>"
    ).encode("big5"),
    "euc-jp": form(
        "<title>日本</title>", head=_said("euc-jp"), about="<authors>A</authors><description>d</description>"
    ).encode("euc-jp"),
    "euc-kr": form(
        "<title>한국</title>", head=_said("euc-kr"), about="<authors>A</authors><description>d</description>"
    ).encode("euc-kr"),
    "iso-2022-jp": form(
        "<title>日本</title>", head=_said("iso-2022-jp"), about="<authors>A</authors><description>d</description>"
    ).encode("iso-2022-jp"),
    "koi8-r": form(
        "<title>Привет</title>", head=_said("koi8-r"), about="<authors>A</authors><description>d</description>"
    ).encode("koi8-r"),
    "ibm850": form(head=_said("ibm850")).encode("cp850"),
    "ibm437": form(head=_said("ibm437")).encode("cp437"),
    "cp1252": form(head=_said("cp1252")).encode("cp1252"),
    "macintosh": form(head=_said("macintosh")).encode("mac-roman"),
    "utf-7": form(head=_said("utf-7"), about="<authors>A</authors><description>d</description>").encode("ascii"),
    "an encoding of no one": form(
        head=_said("klingon"), about="<authors>A</authors><description>d</description>"
    ).encode("ascii"),
    "windows-1252 unsaid": form().encode("cp1252"),
    "windows-1252 unsaid, no head": form(head="").encode("cp1252"),
}

_TEXTS: dict[str, str] = {
    "no description": form(about=""),
    "white space before the head": form(head='\n<?xml version="1.0"?>\n'),
    "white space before the root": form(head="\n\n  "),
    "white space after the root": form() + "\n\n\n",
    "a NUL after the root": form() + "\0",
    "comments and processing instructions": form(
        head='<?xml version="1.0"?><!-- a --><?x y?>',
        inner="<!-- b --><?x y?><!-- -->",
        id=f"<id><!-- c -->{ID}<!-- d --></id>",
    )
    + "<!-- e -->",
    "id in CDATA": form(id=f"<id><![CDATA[{ID}]]></id>"),
    "version 1.1": form(head='<?xml version="1.1" encoding="utf-8"?>'),
    "spaced id": form(id=f"<id> {ID} </id>"),
    "spaced version": form(version=f"<version> {VERSION} </version>"),
    "version on its own line": form(version=f"<version>\n      {VERSION}\n    </version>"),
    "id on its own line": form(id=f"<id>\n      {ID}\n    </id>"),
    "id in lower case": form(id=f"<id>{ID.lower()}</id>"),
    "short version": form(version="<version>1</version>"),
    "two-part version": form(version="<version>1.0</version>"),
    "four-part version": form(version="<version>1.0.0.0</version>"),
    "version with leading zeros": form(version="<version>01.00.0</version>"),
    "version with metadata": form(version=f"<version>{VERSION}+build.5</version>"),
    "version with a v": form(version=f"<version>v{VERSION}</version>"),
    "Id": form(id=f"<Id>{ID}</Id>"),
    "ID and VERSION": form(id=f"<ID>{ID}</ID>", version=f"<VERSION>{VERSION}</VERSION>"),
    "Metadata": form().replace("metadata>", "Metadata>"),
    "Package": form().replace("<package", "<Package").replace("</package", "</Package"),
    "another root": form().replace("<package", "<pkg").replace("</package", "</pkg"),
    "id twice, alike": form(f"<id>{ID}</id>"),
    "id twice": form("<id>Other</id>"),
    "version twice": form("<version>2.0.0</version>"),
    "id in another namespace as well": form('<x:id xmlns:x="urn:x">Other</x:id>'),
    "metadata twice": form(tail="<metadata><id>Other</id><version>2.0.0</version></metadata>"),
    "title twice": form("<title>a</title><title>b</title>"),
    "description twice": form("<description>b</description>"),
    "dependencies twice": form('<dependencies><dependency id="B" version="1.0"/></dependencies>' * 2),
    "no namespace": form(package=""),
    "namespace on metadata alone": form(package="", metadata=f' xmlns="{_NOW}"'),
    "namespace of our own": form(package=' xmlns="urn:acme:nuspec"'),
    "namespace with a slash": form(package=f' xmlns="{_NOW}/"'),
    "namespace over https": form(package=f' xmlns="{_NOW.replace("http:", "https:")}"'),
    "namespace of a year to come": form(package=f' xmlns="{_XSD.format("2031/01")}"'),
    "namespace without a date": form(package=' xmlns="http://schemas.microsoft.com/packaging/nuspec.xsd"'),
    "namespace with white space": form(package=f' xmlns=" {_NOW} "'),
    "empty namespace": form(package=' xmlns=""'),
    "other namespaces beside": form(
        package=f' xmlns="{_NOW}" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xmlns:xsd="http://www.w3.org/2001/XMLSchema"'
    ),
    "prefixed": f'<n:package xmlns:n="{_NOW}"><n:metadata><n:id>{ID}</n:id><n:version>{VERSION}</n:version><n:authors>A</n:authors><n:description>d</n:description></n:metadata></n:package>',
    "metadata in another namespace than package": form(metadata=f' xmlns="{_XSD.format("2011/08")}"'),
    **{
        f"namespace of {year}": form(package=f' xmlns="{_XSD.format(year)}"')
        for year in ("2010/07", "2011/08", "2011/10", "2012/06", "2013/01", "2013/05")
    },
    "unknown elements": form("<packageSourceUrl>x</packageSourceUrl><docsUrl>y</docsUrl><mine><a b='c'>d</a></mine>"),
    "elements of others": form('<x:more xmlns:x="urn:x">y</x:more><title x:a="b" xmlns:x="urn:x">t</title>'),
    "text between elements": form("stray text"),
    "deep unknown elements": form("<a>" * 30 + "</a>" * 30),
    "many files": form(tail="<files>" + '<file src="a" target="b" />' * 2000 + "</files>"),
    "many elements": form(tail="<files>" + "<f/>" * 25000 + "</files>"),
    "many attributes": form(f"<mine{_ATTRIBUTES}/>"),
    "long notes": form(f"<releaseNotes>{'n' * 100_000}</releaseNotes>"),
    "long description": form(about=f"<authors>A</authors><description>{'n' * 70_000}</description>"),
    "empty flag": form("<requireLicenseAcceptance></requireLicenseAcceptance>"),
    "empty flags": form("<requireLicenseAcceptance/><developmentDependency/><serviceable/>"),
    "white flag": form("<requireLicenseAcceptance> </requireLicenseAcceptance>"),
    "spaced flag": form("<developmentDependency> true </developmentDependency>"),
    "upper flag": form("<requireLicenseAcceptance>FALSE</requireLicenseAcceptance>"),
    "flag as number": form("<requireLicenseAcceptance>0</requireLicenseAcceptance>"),
    "flag yes": form("<requireLicenseAcceptance>yes</requireLicenseAcceptance>"),
    "flag of a template": form("<requireLicenseAcceptance>$requireLicense$</requireLicenseAcceptance>"),
    "development flag of a template": form("<developmentDependency>$dev$</developmentDependency>"),
    "serviceable maybe": form("<serviceable>maybe</serviceable>"),
    "license without type": form("<license>MIT</license>"),
    "license Expression": form('<license type="Expression">MIT</license>'),
    "license EXPRESSION": form('<license type="EXPRESSION">MIT</license>'),
    "license by url": form('<license type="url">https://l.example/</license>'),
    "license of empty type": form('<license type="">MIT</license>'),
    "license without value": form('<license type="expression"/>'),
    "license of an unknown version": form('<license type="expression" version="9.9.9">MIT</license>'),
    "license of no version": form('<license type="expression" version="x">MIT</license>'),
    "license not of SPDX": form('<license type="expression">Do what you like</license>'),
    "license file that is not there": form('<license type="file">no.txt</license>'),
    "license and url": form('<licenseUrl>https://l.example/</licenseUrl><license type="expression">MIT</license>'),
    "bad urls": form("<projectUrl>not a url</projectUrl><iconUrl> </iconUrl><licenseUrl>file:///c:/x</licenseUrl>"),
    "dependency without version": _dependencies('<dependency id="B"/>'),
    "dependency with empty version": _dependencies('<dependency id="B" version=""/>'),
    "dependency without id": _dependencies('<dependency version="1.0"/>'),
    "dependency with empty id": _dependencies('<dependency id="" version="1.0"/>'),
    "dependency with a white id": _dependencies('<dependency id=" " version="1.0"/>'),
    "dependency with a spaced id": _dependencies('<dependency id=" B " version="1.0"/>'),
    "dependency with a bad id": _dependencies('<dependency id="B C" version="1.0"/>'),
    "dependency with an id beyond ascii": _dependencies('<dependency id="Grüße" version="1.0"/>'),
    "dependency with a long id": _dependencies(f'<dependency id="{"B" * 120}" version="1.0"/>'),
    "dependency of a template": _dependencies('<dependency id="$id$" version="$version$"/>'),
    "dependency [,]": _dependencies('<dependency id="B" version="[,]"/>'),
    "dependency (,)": _dependencies('<dependency id="B" version="(,)"/>'),
    "dependency with an odd range": _dependencies('<dependency id="B" version="&gt;= 1.0"/>'),
    "dependency with a cut range": _dependencies('<dependency id="B" version="[1.0"/>'),
    "dependency with a floating range": _dependencies('<dependency id="B" version="1.*"/>'),
    "dependency with a turned range": _dependencies('<dependency id="B" version="[2.0,1.0]"/>'),
    "dependency ()": _dependencies('<dependency id="B" version="()"/>'),
    "dependency with odd flags": _dependencies('<dependency id="B" version="1.0" include="nothing" exclude=",,"/>'),
    "dependency twice": _dependencies('<dependency id="B" version="1.0"/><dependency id="b" version="2.0"/>'),
    "empty dependencies": form("<dependencies/>"),
    "text in dependencies": _dependencies("none"),
    "unknown elements in dependencies": _dependencies('<package id="B"/>'),
    "group without framework": _dependencies('<group><dependency id="B" version="1.0"/></group>'),
    "group of an empty framework": _dependencies(
        '<group targetFramework=""><dependency id="B" version="1.0"/></group>'
    ),
    "group of an unknown framework": _dependencies(
        '<group targetFramework="plan9"><dependency id="B" version="1.0"/></group>'
    ),
    "group of an odd framework": _dependencies(
        '<group targetFramework=".NETStandard,Version=x"><dependency id="B" version="1.0"/></group>'
    ),
    "group of a template": _dependencies('<group targetFramework="$tfm$"><dependency id="B" version="1.0"/></group>'),
    "groups of one framework": _dependencies('<group targetFramework="net8.0"/><group targetFramework="net8.0"/>'),
    "groups and loose ones": _dependencies('<group targetFramework="net10.0"/><dependency id="B" version="1.0"/>'),
    "group with a nameless dependency": _dependencies('<group targetFramework="net10.0"><dependency/></group>'),
    "group in a group": _dependencies('<group><group><dependency id="B" version="1.0"/></group></group>'),
    "package type": form('<packageTypes><packageType name="Mine"/></packageTypes>'),
    "package type of an odd version": form('<packageTypes><packageType name="Mine" version="x"/></packageTypes>'),
    "package type of an empty version": form('<packageTypes><packageType name="Mine" version=""/></packageTypes>'),
    "package type without a name": form("<packageTypes><packageType/></packageTypes>"),
    "package type with an empty name": form('<packageTypes><packageType name=""/></packageTypes>'),
    "package type as text": form("<packageTypes><packageType>Dependency</packageType></packageTypes>"),
    "package type twice": form('<packageTypes><packageType name="Mine"/><packageType name="mine"/></packageTypes>'),
    "package types empty": form("<packageTypes/>"),
    "repository without type": form('<repository url="https://g.example/r"/>'),
    "repository empty": form("<repository/>"),
    "repository as text": form("<repository>https://g.example/r</repository>"),
    "client version": form(metadata=' minClientVersion="2.5"'),
    "client version that is none": form(metadata=' minClientVersion="latest"'),
    "client version empty": form(metadata=' minClientVersion=""'),
    "client version beyond": form(metadata=' minClientVersion="99.0"'),
    "icon and readme that are not there": form("<icon>no.png</icon><readme>no.md</readme>"),
    "content files": form(
        '<contentFiles><files include="**/*" buildAction="odd" copyToOutput="perhaps"/></contentFiles>'
    ),
    "content files without include": form("<contentFiles><files/></contentFiles>"),
    "framework references": form(
        '<frameworkReferences><group targetFramework="net10.0"><frameworkReference name="Microsoft.AspNetCore.App"/></group></frameworkReferences>'
    ),
    "framework reference without a name": form(
        '<frameworkReferences><group targetFramework="net10.0"><frameworkReference/></group></frameworkReferences>'
    ),
    "framework assemblies": form(
        '<frameworkAssemblies><frameworkAssembly assemblyName="System" targetFramework="x"/><frameworkAssembly/></frameworkAssemblies>'
    ),
    "references": form(
        '<references><group targetFramework="net10.0"><reference file="a.dll"/></group><reference/></references>'
    ),
    "tags": form("<tags>a, b;c  d</tags>"),
    "elements in texts": form("<title>a<b>c</b>d</title>"),
    "control characters by reference": form("<title>a&#x1;b</title>"),
    "attribute on id": form(id=f'<id a="b">{ID}</id>'),
    "elements in the id": form(id="<id>Acme<b>.Form</b></id>"),
    "templates all over": form(
        "<title>$title$</title><copyright>$copyright$</copyright>",
        about="<authors>$author$</authors><description>$description$</description>",
    ),
    "language that is none": form("<language>klingon</language>"),
    "empty texts": form("<title/><owners/><summary/><tags/><copyright/><releaseNotes/>"),
    "schema location": form(
        package=f' xmlns="{_NOW}" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:schemaLocation="a b"'
    ),
    "xml:space": form(metadata=' xml:space="preserve" xml:lang="en"'),
    "document type": form(head='<?xml version="1.0"?><!DOCTYPE package>'),
    "document type with entities": form(
        "<title>&a;</title>", head='<?xml version="1.0"?><!DOCTYPE package [<!ENTITY a "b">]>'
    ),
    "undefined entity": form("<title>&nbsp;</title>"),
    "not well formed": form("<title>a & b</title>"),
    "unbound prefix": form("<x:title>a</x:title>"),
}

FORMS: Final[dict[str, bytes]] = {**_ENCODED, **{name: text.encode() for name, text in _TEXTS.items()}}

NOT_RESTORED: Final = frozenset(
    {
        "utf-8 without its hyphen",
        "utf-16 with a mark, said to be utf-8",
        "utf-16-be with a mark, said to be utf-8",
        "utf-32-be with a mark",
        "utf-8 said to be utf-16",
        "utf-8 with a mark, said to be utf-16",
        "utf-7",
        "an encoding of no one",
        "windows-1252 unsaid",
        "windows-1252 unsaid, no head",
        "white space before the head",
        "a NUL after the root",
        "version 1.1",
        "spaced id",
        "id on its own line",
        "version with a v",
        "Id",
        "ID and VERSION",
        "Metadata",
        "prefixed",
        "dependency without id",
        "dependency with empty id",
        "dependency with a white id",
        "dependency with a spaced id",
        "dependency with a bad id",
        "dependency with an id beyond ascii",
        "dependency with a long id",
        "dependency of a template",
        "dependency twice",
        "group of an odd framework",
        "group with a nameless dependency",
        "package type of an odd version",
        "package type of an empty version",
        "package type without a name",
        "package type with an empty name",
        "package type as text",
        "client version that is none",
        "client version empty",
        "client version beyond",
        "framework reference without a name",
        "control characters by reference",
        "document type",
        "document type with entities",
        "undefined entity",
        "not well formed",
        "unbound prefix",
    }
)
"""What NuGet refuses, or cannot bring to an end: a dependency that no feed has, a client to come."""
