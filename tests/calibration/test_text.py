"""Text sources: every reader on good and bad input, the markup cleaner on handwritten markup, disjoint splits."""

import bz2
import importlib.util
import json

import pytest

from anybit.calibration import text, wiki
from anybit.calibration.text import read_documents
from anybit.errors import CalibrationError

needs_gensim = pytest.mark.skipif(importlib.util.find_spec("gensim") is None, reason="pip install --no-deps gensim")


def test_txt_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first\n\n\nsecond é", encoding="utf-8")
    assert read_documents(str(path)) == ["first\n\n\nsecond é"]


def test_undecodable_text_names_file_and_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(CalibrationError, match=r"a\.txt' is not UTF-8 text \(byte 3\)"):
        read_documents(str(path))


@pytest.mark.parametrize("content", ["", " \n\n\t"])
def test_text_without_words_is_refused(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(CalibrationError, match="holds no text"):
        read_documents(str(path))


def test_unknown_name_and_unknown_kind(tmp_path):
    with pytest.raises(CalibrationError, match="did you mean 'topics'"):
        read_documents("topic")
    path = tmp_path / "a.pdf"
    path.write_bytes(b"x")
    with pytest.raises(CalibrationError, match="no known kind"):
        read_documents(str(path))


def test_jsonl_reads_the_field_and_skips_empty_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one\u2028line", "body": "1"}, {"text": "  "}, {"text": "two", "body": "2"}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read_documents(str(path)) == ["one\u2028line", "two"]
    with pytest.raises(CalibrationError, match=r"line 3 .* no field 'body'; found: text \(choose with --field\)"):
        read_documents(str(path), field="body")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "x", "id": 1}', "no field 'text'; found: content, id"),
        ('{"text": "x"', "line 2 .* is not JSON"),
        ('"just a string"', "is a str, not an object"),
        ('{"text": 3}', "field 'text' of line 2 .* is a int, not a string"),
        ('{"text": null}', "is a NoneType"),
    ],
)
def test_bad_jsonl_lines(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(CalibrationError, match=message):
        read_documents(str(path))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "", "two"], "n": [1, 2, 3]}), path)
    assert read_documents(str(path)) == ["one", "two"]
    with pytest.raises(CalibrationError, match="no field 'body'; found: text, n"):
        read_documents(str(path), field="body")
    with pytest.raises(CalibrationError, match=r"field 'n' of row 0 .* is a int"):
        read_documents(str(path), field="n")
    path.write_bytes(b"not parquet at all")
    with pytest.raises(CalibrationError, match="is not a parquet file"):
        read_documents(str(path))


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CalibrationError, match=r"needs pyarrow: run `pip install anybit\[data\]`"):
        read_documents(str(path))
    with pytest.raises(CalibrationError, match=r"pip install --no-deps gensim`, or use 'topics'"):
        read_documents("wiki")


def test_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["one", "two"]})
    data.save_to_disk(str(tmp_path / "flat"))
    assert read_documents(str(tmp_path / "flat")) == ["one", "two"]
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(CalibrationError, match="has splits test"):
        read_documents(str(tmp_path / "splits"))
    assert read_documents(str(tmp_path / "splits" / "test")) == ["one", "two"]
    with pytest.raises(CalibrationError, match="is not a saved dataset"):
        read_documents(str(tmp_path))


def test_hub_failure_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(name, config, split):
        assert (name, config, split) == ("who/what", "en", "train")
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(CalibrationError, match=r"^cannot load 'hf:who/what:en' \(no route\); check .* use 'topics'$"):
        read_documents("hf:who/what:en")


def test_topics_is_always_there():
    topics = read_documents("topics")
    assert len(topics) > 50
    assert sum(map(len, topics)) > 300_000


@needs_gensim
def test_lee_is_one_document_per_text():
    lee = read_documents("lee")
    assert len(lee) == 300
    assert all("\n" not in document for document in lee)


@needs_gensim
def test_wiki_splits_share_no_article_and_are_clean():
    train, test = read_documents("wiki"), read_documents("wiki-test")
    assert len(train) > 70
    assert len(test) == (len(train) + len(test)) // wiki.TEST_EVERY
    assert not set(train) & set(test)
    openings = [document[:60] for document in train + test]
    assert len(set(openings)) == len(openings)
    for document in train + test:
        assert len(document) >= wiki.MIN_CHARACTERS
        for trace in ("[[", "]]", "'''", "<ref", "&nbsp;", "Category:", "{{cite", "\n\n\n"):
            assert trace not in document, document[:60]


def test_split_takes_every_fifth():
    articles = [str(at) for at in range(12)]
    assert wiki.split(articles, test=True) == ["4", "9"]
    assert wiki.split(articles, test=False) == ["0", "1", "2", "3", "5", "6", "7", "8", "10", "11"]


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("'''Bold''' and ''italic'' and '''''both'''''", "Bold and italic and both"),
        ("a [[link]], a [[Target page|label]], [[Page#part|x]]s", "a link, a label, xs"),
        ("before<!-- hidden\n{{x}} -->after", "beforeafter"),
        ('said<ref>{{cite web|title=A|b}}</ref> so<ref name="n"/>.<ref name=m>z</ref>', "said so."),
        ("x {{infobox|a={{nested|b}}|c={d}|e={{f}}}} y", "x y"),
        ("{| class=x\n|-\n| cell || {{flag|A}}\n{| inner\n|}\n|}\nText", "Text"),
        ("[[File:A.jpg|thumb|a [[nested [x]]] caption [http://a.b c]]]Text", "Text"),
        ("see [http://a.b/c?d the site] or [http://e.f]", "see the site or"),
        ("[[Category:Things]]\n[[fr:Choses]]\nText", "Text"),
        ("5&nbsp;&lt;&nbsp;6 &amp;mdash; yes", "5 < 6 — yes"),
        ("H<sub>2</sub>O<br/>and", "H2O and"),
        ("* one\n** two\n# three\n: four\n:* five", "- one\n- two\n- three\nfour\n- five"),
        ("ran {{convert|26|mi|km}} in {{convert|3|to|5|hours|abbr=on}}", "ran 26 mi in 3 to 5 hours"),
        ("the {{lang|grc|[[Logos|λόγος]]}} is {{lang-la|verbum}}", "the λόγος is verbum"),
        ("Aachen ({{IPA-de|x}}; {{audio|y}}) is", "Aachen is"),
        ("Aachen ({{audio|y}}, or Aix) is", "Aachen (or Aix) is"),
        ("energy <math>E = mc^2</math> here", "energy here"),
        ("#REDIRECT [[Elsewhere]]", ""),
        ("open [[Half link|and {{half template", "open Half link|and half template"),
    ],
)
def test_strip_markup(markup, plain):
    assert wiki.strip_markup(markup) == plain


def test_sections_keep_headings_with_text_and_drop_link_lists():
    markup = (
        "Lead.\n== Life ==\n=== Youth ===\nBorn.\n=== Empty ===\n== References ==\n* [http://x y]\n"
        "=== Sub ===\ngone\n== Legacy ==\nGreat.\n== See also ==\n* [[Gone]]"
    )
    assert wiki.strip_markup(markup) == "Lead.\n\nLife\n\nYouth\n\nBorn.\n\nLegacy\n\nGreat."


def test_read_dump_keeps_long_articles_of_the_main_namespace(tmp_path):
    def page(title, namespace, body):
        return f"<page><title>{title}</title><ns>{namespace}</ns><revision><text>{body}</text></revision></page>"

    body = "word " * 300
    pages = [page("Long", 0, body), page("Talk:Long", 1, body), page("Stub", 0, "short"), page("Next", 0, body + "x")]
    xml = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">' + "".join(pages) + "</mediawiki>"
    path = tmp_path / "dump.bz2"
    path.write_bytes(bz2.compress(xml.encode()))
    assert list(wiki.read_dump(path)) == [("Long", body.strip()), ("Next", body + "x")]
