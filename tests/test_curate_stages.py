"""The stages of a curation as functions of rows: measures, rules, duplicates, captions.

Sums and choices are exact.  Where a figure has a tolerance the test says why.  One thing a reader
would get wrong: duplicates are compared with a search over all pairs, which shares no code with the
banded search but the distances themselves, and those are compared with a slow one first.
"""

import io
import itertools
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFont

import tiny
from curating import SENTENCE, folder_of, recipe, task, waves, with_section
from eve_vlm.cli import curating
from eve_vlm.curate import captions, duplicates, filters, hashes, looking, shards, sources
from eve_vlm.curate.blocks import gather, read_kept, write_unit
from eve_vlm.curate.ledger import unit_file
from eve_vlm.curate.recipe import CaptionsSection, SourceSection
from eve_vlm.curate.tasks import Layout
from eve_vlm.train.recipe import recipes_folder


def listed(of):
    """All rows that reading lists, as dictionaries."""
    inputs = sources.list_inputs(pa.table({}), task(of))
    return [
        row
        for number in range(len(inputs))
        for table in sources.list_pictures(inputs.slice(number, 1), task(of))
        for row in table.to_pylist()
    ]


def looked(of):
    rows = pa.Table.from_pylist(listed(of), schema=sources.row_schema())
    return looking.look(rows, task(of))


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", sorted(recipes_folder().glob("curate/*.yaml")), ids=lambda f: f.stem
)
def test_shipped_recipes_load_and_say_what_is_asked(file):
    of = curating.load(f"curate/{file.stem}")
    text = file.read_text(encoding="utf-8")
    assert f"eve curate curate/{file.stem}" in text and of.name == file.stem
    assert all(word in text for word in ("# Needs", "# Hardware", "# Time", "# Asked of you"))
    assert all(len(line) <= 100 for line in text.splitlines())
    assert all(source.licence for source in of.sources)


def test_the_published_recipes_have_the_published_numbers():
    laion = curating.load("curate/laion")
    assert (laion.spread.centres, laion.spread.nearest) == (50_000, 300)
    for name in ("sa1b", "openimages", "laion"):
        assert curating.load(f"curate/{name}").filter.shorter_side_above == 448


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("filter.shorter_side=3", "did you mean 'shorter_side_above'"),
        ("block=0", "block is 0"),
        ("duplicates.distance=20", "0 to 8"),
        ("sources.0.name='a b'", "sources.0.name"),
        ("recaption.sampling.stop=x", "does not take"),
        ("filter.least_detail=-1", "0 or more"),
        ("decode.svg_size=0", "at least 1"),
        ("fetch.timeout=0", "above 0"),
        ("sources.0.columns={caption: txt}", "columns has caption"),
        ("captions.languages=[english]", "'english'"),
        ("sources=[]", "add where pictures come from"),
        ("recaption.cost.per_hour=3", "captions_per_second"),
    ],
)
def test_mistakes_in_a_recipe_are_one_sentence(override, words):
    text = tiny.refused(lambda: curating.load("curate/offline_emoji", [override]))
    assert words in text and text.startswith(("curate/offline_emoji", "command line"))


# --- reading --------------------------------------------------------------------------------------


def test_a_folder_is_listed_in_blocks_with_the_words_beside(tmp_path):
    ids = folder_of(tmp_path / "in", 23)
    (tmp_path / "in" / "notes.md").write_text("no picture")
    of = recipe(tmp_path / "in", tmp_path / "out")
    inputs = sources.list_inputs(pa.table({}), task(of))
    blocks = list(sources.list_pictures(inputs, task(of)))
    assert [len(block) for block in blocks] == [10, 10, 3]
    rows = [row for block in blocks for row in block.to_pylist()]
    assert [row["id"] for row in rows] == [f"waves/{id}" for id in ids]
    assert [row["text"] for row in rows] == [SENTENCE.format(number) for number in range(23)]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_pictures_inside_of_files_are_found_where_they_lie(kind, tmp_path):
    """The bytes that a row leads to are those that were put in."""
    data = {}
    for number in range(7):
        stream = io.BytesIO()
        waves(number, 32, 24).save(stream, "PNG")
        data[f"{number:03d}"] = stream.getvalue()
    if kind == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for key, value in data.items():
                for ending, body in (("png", value), ("txt", f"Words of {key}.\nEs.".encode())):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(body)
                    tar.addfile(member, io.BytesIO(body))
        columns, ids = {"text": "txt"}, [f"s/a.tar/{key}.png" for key in data]
    else:
        table = pa.table(
            {
                "key": list(data),
                "jpg": list(data.values()),
                "alt": [f"Words of {key}." for key in data],
            }
        )
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
        columns = {"text": "alt", "image": "jpg", "id": "key"}
        ids = [f"s/a.parquet/{key}" for key in data]
    source = SourceSection(
        name="s", kind=kind, path=str(tmp_path / f"*.{kind}"), licence="CC0-1.0", columns=columns
    )
    rows = listed(recipe("", tmp_path / "out", sources=[source]))
    assert [row["id"] for row in rows] == ids
    assert [row["text"] for row in rows] == [f"Words of {key}." for key in data]
    assert [looking.read_bytes(row) for row in rows] == list(data.values())


def test_lists_of_urls_keep_what_stands_beside_and_refuse_an_id_twice(tmp_path):
    file = tmp_path / "list.csv"
    lines = ("link,key,lic,width,height", "http://a/1.jpg,x,CC BY,640,480.0", ",y,,1,1",
             "http://a/2.jpg,z,,,9")  # fmt: skip
    file.write_text("\n".join(lines))
    columns = {"url": "link", "id": "key", "licence": "lic"}
    source = SourceSection(
        name="u", kind="urls", path=str(file), licence="unknown", columns=columns
    )
    of = recipe("", tmp_path / "out", sources=[source])
    found = [(row["id"], row["member"], row["licence"], row["listed_side"]) for row in listed(of)]
    assert found == [
        ("u/list.csv/x", "http://a/1.jpg", "CC BY", 480),
        ("u/list.csv/y", None, "unknown", 1),  # fetching drops it, and so counts it
        ("u/list.csv/z", "http://a/2.jpg", "unknown", None),
    ]
    file.write_text("link,key,lic\nhttp://a/1.jpg,x,\nhttp://a/2.jpg,x,\n")
    assert "'x' twice" in tiny.refused(lambda: listed(of))
    file.write_text("url\nhttp://a/1.jpg\n")
    assert "no column 'link'" in tiny.refused(lambda: listed(of))
    file.write_text("link,key\nhttp://a/1.jpg,x\n")  # named, so its licences must not be lost
    assert "no column 'lic'" in tiny.refused(lambda: listed(of))


def test_files_of_one_name_in_two_folders_have_ids_of_their_own(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "list.txt").write_text("http://x/1.jpg\n")
    source = SourceSection(
        name="u", kind="urls", path=str(tmp_path / "*" / "list.txt"), licence="?"
    )
    rows = listed(recipe("", tmp_path / "out", sources=[source]))
    assert [row["id"] for row in rows] == ["u/a/list.txt/1", "u/b/list.txt/1"]


# --- looking and filtering ------------------------------------------------------------------------


def test_what_cannot_be_opened_is_dropped_and_the_rest_measured(tmp_path):
    folder_of(tmp_path / "in", 3)
    whole = (tmp_path / "in/000/00000.png").read_bytes()
    (tmp_path / "in/000/00001.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in/000/00002.png").write_bytes(b"<html>not found</html>")
    rows = looked(recipe(tmp_path / "in", tmp_path / "out")).to_pylist()
    assert [row["why"] for row in rows] == [None, "cannot be opened", "cannot be opened"]
    assert "00001.png" in rows[1]["because"] and "\n" not in rows[1]["because"]
    assert (rows[0]["width"], rows[0]["height"], rows[0]["format"]) == (160, 120, "png")
    grey = np.asarray(Image.open(tmp_path / "in/000/00000.png").convert("L"), float)
    # The copy averages about 1.6 pixels of smooth waves, which takes little from the deviation.
    assert rows[0]["contrast"] == pytest.approx(grey.std(), rel=0.05)


def test_what_is_transparent_stands_on_white_and_is_written_so(tmp_path):
    """A black disc on nothing: blank to whoever forgets the alpha channel."""
    (tmp_path / "in").mkdir()
    disc = Image.new("RGBA", (200, 200))  # black, and nothing of it to be seen
    ImageDraw.Draw(disc).ellipse((40, 40, 160, 160), fill=(0, 0, 0, 255))
    disc.save(tmp_path / "in/disc.png")
    Image.new("RGBA", (200, 200), (90, 120, 200, 255)).save(
        tmp_path / "in/opaque.webp", lossless=True
    )
    of = recipe(tmp_path / "in", tmp_path / "out")
    rows = looked(of)
    assert rows["redrawn"].to_pylist() == [True, False]
    assert rows["contrast"][0].as_py() > 100  # of at most 127.5, half black and half white
    row = rows.to_pylist()[0] | {"caption": "A disc.", "captioner": None}
    made = shards.written(row, task(of))
    written = Image.open(io.BytesIO(made.picture))
    assert (written.mode, made.ending, written.getpixel((0, 0))) == ("RGB", "png", (255, 255, 255))
    assert (
        written.getpixel((100, 100)) == (0, 0, 0)
        and made.facts["sha256_found"] != made.facts["sha256"]
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"width": 448, "height": 900}, "too small"),  # the paper keeps what is above 448
        ({"width": 449, "height": 449}, None),
        ({"width": 2000, "height": 500}, "too long and thin"),
        ({"contrast": 0.0, "detail": 0.0}, "blank"),
        ({"detail": 0.2}, "little detail"),
        ({"text_share": 0.9}, "mostly text"),
        ({"width": 10, "height": 10, "contrast": 0.0}, "too small"),  # the first rule counts
    ],
)
def test_each_rule_of_the_filter(changes, expected, tmp_path):
    good = {"width": 800, "height": 600, "contrast": 50.0, "detail": 9.0, "text_share": 0.0}
    of = with_section(recipe("", tmp_path), "filter", shorter_side_above=448)
    table = filters.keep_good(pa.Table.from_pylist([good | changes]), task(of))
    assert table["why"].to_pylist() == [expected]


def page_of_text(size: int) -> Image.Image:
    page = Image.new("RGB", (800, 1000), "white")
    font, words = ImageFont.load_default(size), "many people walk along the river and talk "
    for y in range(10, 1000 - size, int(1.35 * size)):
        ImageDraw.Draw(page).text((10, y), 4 * words, font=font, fill="black")
    return page


def test_pages_of_text_are_told_from_pictures():
    """Letters of 10 to 40 pixels on a page of 1000; waves, noise and a chess board are no text."""
    assert all(looking.text_share(page_of_text(size)) > 0.6 for size in (10, 14, 20, 28, 40))
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    chess = np.kron(np.indices((64, 64)).sum(0) % 2 * 255, np.ones((8, 8))).astype(np.uint8)
    for picture in (waves(1, 600, 500), Image.fromarray(noise), Image.fromarray(chess)):
        assert looking.text_share(picture) < 0.1


# --- duplicates -----------------------------------------------------------------------------------


def test_hashes_stay_near_when_a_picture_is_resized_or_saved_again():
    apart = []
    for seed in range(40):
        picture = waves(seed, 320, 240)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=60)
        for copy in (picture.resize((200, 150)), Image.open(stream)):
            near = hashes.bits_apart(
                *(np.uint64(hashes.coarse_hash(one)) for one in (picture, copy))
            )
            apart.append(int(near))
        others = hashes.bits_apart(
            np.uint64(hashes.coarse_hash(picture)),
            np.uint64(hashes.coarse_hash(waves(seed + 1000))),
        )
        assert others > 8  # bits: of random hashes one in 10^9 is nearer
    assert np.mean(np.array(apart) <= 3) > 0.95  # measured 1.0; one flipped cell in 40 may happen


def test_hashes_within_the_distance_share_a_key():
    """All ways to flip up to d bits, drawn at random, for every d."""
    rng = np.random.default_rng(0)
    for distance in range(9):
        plain = rng.integers(0, 2**63, 200, np.uint64)
        flipped = plain.copy()
        for row in range(len(plain)):
            for bit in rng.choice(64, distance, replace=False).tolist():
                flipped[row] ^= np.uint64(1 << bit)
        keys, others = (
            duplicates.band_keys(plain, distance),
            duplicates.band_keys(flipped, distance),
        )
        assert (keys == others).any(1).all()


def planted(count, seed=0):
    """Rows with hashes of which some are near others, equal files, and chains."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        if rows and rng.random() < 0.5:
            other = rows[rng.integers(len(rows))]
            row = dict(other)
            if rng.random() < 0.7:
                bits = rng.choice(64, rng.integers(0, 6), replace=False).tolist()
                row["hash"] = other["hash"] ^ sum(1 << bit for bit in bits)
                row["sha256"] = rng.bytes(32)
                changed = bytearray(other["signature"])
                for at in rng.choice(32, rng.integers(0, 12), replace=False):
                    changed[at] ^= int(rng.integers(256))
                row["signature"] = bytes(changed)
        else:
            row = {"hash": int(rng.integers(2**63)), "sha256": rng.bytes(32)}
            row["signature"] = rng.bytes(hashes.SIGNATURE)
        row |= {"id": f"{number:05d}", "width": int(rng.integers(1, 4)), "height": 1}
        rows.append(row)
    return rows


def all_pairs(rows, section):
    """Why each row goes, from every pair of rows and Python's own integers."""
    why = []
    for row in rows:
        rank = (-row["width"], row["id"])
        better = [one for one in rows if (-one["width"], one["id"]) < rank]

        def near(one, row=row):
            if (one["hash"] ^ row["hash"]).bit_count() > section.distance:
                return False
            fine = [int.from_bytes(each["signature"][:32], "big") for each in (one, row)]
            colours = zip(one["signature"][32:], row["signature"][32:], strict=True)
            return (fine[0] ^ fine[1]).bit_count() <= section.fine_distance and (
                sum(abs(a - b) for a, b in colours) / 48 <= section.colour_distance
            )

        if any(one["sha256"] == row["sha256"] for one in better):
            why.append(duplicates.SAME)
        elif section.near and any(near(one) for one in better):
            why.append(duplicates.NEAR)
        else:
            why.append(None)
    return why


@pytest.mark.parametrize("near", [True, False])
def test_the_search_finds_what_all_pairs_find(near, tmp_path, monkeypatch):
    """Over several blocks and pieces, whichever block a duplicate is in."""
    monkeypatch.setattr("eve_vlm.curate.tasks.BUCKET_ROWS", 100)
    of = with_section(recipe("", tmp_path), "duplicates", near=near)
    rows = planted(600)
    blocks = tuple(f"b{number}" for number in range(6))
    order = np.random.default_rng(1).permutation(600)
    schema = pa.schema([("id", pa.string()), ("hash", pa.uint64()), ("sha256", pa.binary(32)),
                        ("signature", pa.binary(hashes.SIGNATURE)), ("width", pa.int32()), ("height", pa.int32())])  # fmt: skip
    tables = {
        block: pa.Table.from_pylist([rows[at] for at in part], schema=schema)
        for block, part in zip(blocks, np.split(order, 6), strict=True)
    }
    settings = {"blocks": blocks, "rows": 600}
    assert Layout(**settings).buckets == 6
    for block, table in tables.items():
        made = duplicates.file_keys(table, task(of, unit=block, **settings))
        write_unit(unit_file(tmp_path, duplicates.KEYS, block), made, {})
    files = [unit_file(tmp_path, duplicates.KEYS, block) for block in blocks]
    for bucket in range(6):
        unit = f"{bucket:05d}"
        made = duplicates.find_pairs(gather(files, bucket), task(of, unit=unit, **settings))
        write_unit(unit_file(tmp_path, duplicates.PAIRS, unit), made, {})
    found = {}
    for block, table in tables.items():
        made = duplicates.drop_duplicates(table, task(of, unit=block, **settings))
        found |= dict(zip(made["id"].to_pylist(), made["why"].to_pylist(), strict=True))
    expected = all_pairs(rows, of.duplicates)
    assert {duplicates.SAME, None} | ({duplicates.NEAR} if near else set()) == set(expected)
    assert [found[row["id"]] for row in rows] == expected


def test_the_search_grows_with_the_number_of_pictures_and_not_with_its_square():
    """Pairs that are compared, for random hashes: the count of equal keys, which has no noise."""
    compared = []
    for count in (10_000, 100_000):
        keys = duplicates.band_keys(
            np.random.default_rng(0).integers(0, 2**63, count, np.uint64), 3
        )
        _, sizes = np.unique(keys, return_counts=True)
        compared.append(int((sizes * (sizes - 1) // 2).sum()))
    # Ten times the pictures have a hundred times the chance pairs, but next to none of them meet:
    # 10 keys of 25 bits for 5 * 10^9 pairs of pictures are 1,400 meetings.
    assert compared[1] < 0.05 * 100_000


# --- captions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog runs along a beach while the sun goes down.", None),
        ('A sign that says "Open until late."', None),
        ("Two cups, a plate, bread, etc.", None),
        ("A dog runs along a beach while the sun goes", "unfinished caption"),
        ("A dog", "caption too short"),
        ("I'm sorry, but I cannot see any image here.", "refusal"),
        ("I\u2019m unable to view the picture that you sent.", "refusal"),
        ("As an AI language model, I do not have eyes.", "refusal"),
        ("A man holds a sign on which is written I am here.", None),
        ("The sky is blue and " * 12 + "the end.", "caption repeats itself"),
        ("word " * 401 + "end.", "caption too long"),
        ("", "no caption"),
        (None, "no caption"),
    ],
)
def test_each_rule_of_captions(text, expected):
    section = CaptionsSection(languages=None)
    assert captions.broken_rule(text, section)[0] == expected


def test_other_languages_are_dropped():
    pytest.importorskip("py3langid", reason="needs the extra curate")
    section = CaptionsSection(languages=["en"])
    kept = "A brown dog runs along the beach while children play with a red ball."
    for text in (
        "Ein brauner Hund rennt am Strand entlang, und Kinder spielen mit einem roten Ball.",
        "Un chien brun court le long de la plage pendant que des enfants jouent au ballon.",
        "一只棕色的狗在沙滩上奔跑, 孩子们在玩红色的球。",
    ):
        assert captions.broken_rule(text, section)[0] == "other language"
    assert captions.broken_rule(kept, section)[0] is None


def test_captions_are_tidied_and_the_words_of_the_source_stand_in(tmp_path):
    rows = pa.table({"text": ["  A red   ball\nlies on grass. ", None]})
    made = captions.keep_good_captions(rows, task(recipe("", tmp_path)))
    assert made["caption"].to_pylist() == ["A red ball lies on grass.", None]
    rows = rows.append_column("caption", pa.array(["A blue ball in the sea.", "A cat on a mat."]))
    made = captions.keep_good_captions(rows, task(recipe("", tmp_path)))
    assert made["caption"].to_pylist() == ["A blue ball in the sea.", "A cat on a mat."]


# --- files ----------------------------------------------------------------------------------------


def test_pieces_are_read_back_from_all_files(tmp_path):
    table = pa.table({"x": list(range(20)), "piece": [n % 3 for n in range(20)]})
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet", tmp_path / "c.parquet"]
    write_unit(files[0], table, {})
    write_unit(files[1], table.slice(0, 1), {})
    write_unit(files[2], table.slice(0, 0), {})
    found = [gather(files, piece)["x"].to_pylist() for piece in range(4)]
    assert found == [[*range(0, 20, 3), 0], list(range(1, 20, 3)), list(range(2, 20, 3)), []]


def test_a_unit_that_fails_half_way_leaves_nothing(tmp_path):
    """A column that cannot be written stops the writing after the file was begun."""

    class Bad(dict):
        def __iter__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises((OSError, TypeError)):
        write_unit(tmp_path / "a.parquet", pa.table({"x": [1]}), {"facts": {Bad(): 1}})
    assert list(tmp_path.iterdir()) == []
    write_unit(tmp_path / "a.parquet", pa.table({"x": [1]}), {"n": 1})
    assert read_kept(tmp_path / "a.parquet")["x"].to_pylist() == [1]
    assert list(itertools.chain(tmp_path.iterdir())) == [tmp_path / "a.parquet"]
