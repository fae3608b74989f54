import pytest

from t5style.samples import build


def text_of(html):
    lxml_html = pytest.importorskip("lxml.html")
    return build.html_text(lxml_html.fromstring(html))


def test_html_becomes_paragraphs_lists_rows_and_code():
    html = """<div><h1>Title <a class="headerlink" href="#t">¶</a></h1>
      <p>One   paragraph with <b>bold</b>,
         <code>code</code> and&nbsp;more.</p><script>no()</script>
      <ul><li><p>first</p></li><li>second</li></ul>
      <pre>def f():
    return 1
</pre><table><tr><th>a</th><td>b</td></tr><tr><td>c</td><td>d</td></tr></table>tail</div>"""
    assert text_of(html) == (
        "Title\n\nOne paragraph with bold, code and more.\n\n- first\n- second\n\n"
        "def f():\n    return 1\n\na b\nc d\n\ntail\n"
    )


def test_glosses_part_into_definition_and_examples():
    assert build._gloss('a thing; a real one; "it was a thing"; "two things"') == (
        "a thing; a real one",
        ["it was a thing", "two things"],
    )
    assert build._gloss("no examples; just this") == ("no examples; just this", [])


def test_a_line_of_wordnet_is_read():
    line = (
        "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 002 @ 02083346 n 0000 ~ 01322604 n 0000 "
        '| a member of the genus Canis; "the dog barked"  '
    )
    name, synset = build._synset(line, {"dog%1:05:00": 42, "domestic_dog%1:05:00": 1})
    assert name == "n02084071"
    assert synset.terms == ["dog", "domestic dog", "Canis familiaris"]
    assert synset.counts == [42, 1, 0]
    assert (synset.lexname, synset.hypernym) == ("noun.animal", "n02083346")
    satellite = "00001740 00 s 01 able(p) 0 000 | having skill"
    name, synset = build._synset(satellite, {})
    assert (name, synset.terms, synset.lexname, synset.hypernym) == ("a00001740", ["able"], "adj.all", "")
