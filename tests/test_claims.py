"""Every privacy sentence that a reader meets is mapped in docs/claims.toml to the proof or the test behind it.

docs/claims.toml says what a sentence, a claim and a phrase are, and how to add one.
"""

import ast
import functools
import re
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

# A privacy sentence has a word of promise by itself, or one of a subject and one of how firmly something is said of it. Wide on purpose:
# a sentence that promises nothing costs a line among the asides, and a promise that is not seen costs more.
PROMISES = re.compile(
    r"\b(?:never|nobody|nothing|cannot|protect\w*|hides?|hidden|post-processing|trusted|trust|refus\w+|forget|forgotten|stranger"
    r"|(?:synthetic|real|private) images?|same bytes|byte for byte|to the byte|bit by bit|without limit|under-counts?|redraws?"
    r"|behind one door|exactly rounded|released|whatever|anyone|nowhere|promises?|whether|covers?|covered|public by|attested|opaque)\b",
    re.IGNORECASE,
)
SUBJECTS = re.compile(
    r"[εδ]|\b(?:epsilon|delta|privacy|private|guarantees?|nois[ey]|charged?|charges|ledger|budget|cap|secret|keys?|records?|certificate|"
    r"proved|proofs?|prove|audit\w*|sums?|bytes?|pickle|door|data|unit|person|owner)\b",
    re.IGNORECASE,
)
FIRMLY = re.compile(
    r"\b(?:no|not|none|only|alone|exact\w*|identical|same|before|guarantees?|proves?|proved|proofs?|free|costs?|holds?|erased|"
    r"recompute\w*|compared?|at most|whatever|stays?|without|every|any|anyone|whole|checks?|checked|checkable|must|once|always|each|"
    r"independent|depends?|true|gone|public|in full|rounded)\b|-DP\b",
    re.IGNORECASE,
)

TABLES = {  # each row names the check behind it; `test_every_test_that_a_page_names_exists` reads it
    "docs/pitfalls.md",
    "docs/mutation.md",
}
OTHERS = "docs/beside-others.md"  # the tests that it names are those of other projects
THEOREMS = ("Statement", "Theorem")  # of a proof page; the rest of it is the proof
CODE = {  # strings that a person reads: all but what refuses and what explains the code; of these names only, where some are named
    "src/dpdistill/audit/result.py": ("SAYS",),
    "src/dpdistill/audit/run.py": ("NO_RECORD_IN_SUMS",),
    "src/dpdistill/cli/__init__.py": None,
    "src/dpdistill/cli/common.py": None,
    "src/dpdistill/cli/make.py": None,
    "src/dpdistill/cli/review.py": None,
    "src/dpdistill/bundle/certificate.py": None,
    "src/dpdistill/bundle/claims.py": None,
    "src/dpdistill/bundle/verification.py": ("UNCHECKED", "_AUDIT", "_ATTESTED", "_OTHER_PAGES"),
    "src/dpdistill/methods/diffusion/dpdm.py": ("advice",),
    "src/dpdistill/methods/diffusion/dpsad.py": ("advice",),
    "src/dpdistill/methods/diffusion/shard_teachers.py": ("advice",),
    "src/dpdistill/methods/model/votes.py": ("advice",),
    "src/dpdistill/privacy/guarantee.py": None,
    "tools/verify_release.py": ("UNCHECKED",),
}


def plain(text: str) -> str:
    """Text without the marks of Markdown, HTML and Jinja; `…` for a value that is filled in."""
    text = re.sub(r"\{%.*?%\}", " ", text, flags=re.DOTALL)
    text = re.sub(r"\{\{.*?\}\}", "…", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"</?[a-z][^<>]*>|[*`]|&nbsp;", " ", text)
    return re.sub(r" (?=[.,;:)](?!\w))|(?<=\() ", "", " ".join(text.split()))


def split(text: str) -> list[str]:
    """Sentences of running text; a heading or a cell is one too."""
    parts = re.split(r"(?<=[.!?])\s+(?=[^\sa-z0-9])", plain(text))
    return [part for part in parts if len(re.findall(r"\w+", part)) > 1]


def markdown(text: str, only: Collection[str] = ()) -> list[str]:
    """Sentences of a page, or of its beginning and what is under the headings `only`. A row of a table is one; code is none."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^\|.*\n\|[-: |]+\|$", "", text, flags=re.MULTILINE)  # the head of a table
    found: list[str] = []
    block: list[str] = []
    inside = True
    for line in [*map(str.strip, text.splitlines()), ""]:
        if not line or re.match(r"#+ |[|>]|([-*]|\d+\.) |\{%", line):
            found += split(" ".join(block)) if inside else []
            block = []
        if line.startswith("# ") and only:
            continue
        if line.startswith("#"):
            inside = not only or line.lstrip("# ") in only
            found += split(line.lstrip("# ")) if not only else []
        elif line.startswith("|"):
            found += [plain(line.replace("|", " | ")).strip("| ")] if inside else []
        else:
            block.append(re.sub(r"^([-*>]|\d+\.) ", "", line))
    return found


def page(text: str) -> list[str]:
    """Sentences of an HTML template: the tag of a block ends one."""
    text = re.sub(r"<(style|svg|pre)\b.*?</\1>", " ", text, flags=re.DOTALL)
    blocks = re.split(r"</?(?:p|li|h\d|dt|dd|div|summary|figcaption|title|strong|small|t[dhr])\b[^>]*>", text)
    return [sentence for block in blocks for sentence in split(block)]


def strings(text: str, names: Collection[str] | None = None) -> list[str]:
    """Sentences of a module's strings: what a command prints, its help and its docstring; or only what `names` are set to, or say."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and _name(node.func) in ("expect", "number")):
            return  # a refusal promises nothing
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            command = isinstance(node, ast.FunctionDef) and any("command" in ast.dump(d) for d in node.decorator_list)
            children = [child for child in ast.iter_child_nodes(node) if command or child is not node.body[0]]
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.JoinedStr):
            found.extend(split("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.extend(split(node.value))
        else:
            for child in children:
                visit(child)

    tree = ast.parse(text)
    if names is None:
        visit(tree)
    for node in tree.body if names is not None else []:
        if isinstance(node, ast.Assign) and _name(node.targets[0]) in (names or ()):
            visit(node.value)
        elif isinstance(node, ast.FunctionDef) and node.name in (names or ()):
            visit(node)
    return found


def _name(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def promising(sentences: Collection[str]) -> list[str]:
    """The privacy sentences among these, each once."""
    seen = (s for s in sentences if PROMISES.search(s) or (SUBJECTS.search(s) and FIRMLY.search(s)))
    return list(dict.fromkeys(seen))


def pages() -> Iterator[tuple[str, list[str]]]:
    """Each file that makes privacy sentences, and all its sentences."""
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if (name := path.relative_to(ROOT).as_posix()) not in TABLES:
            yield name, markdown(path.read_text("utf-8"))
    for path in sorted((ROOT / "docs" / "privacy").glob("*.md")):
        yield path.relative_to(ROOT).as_posix(), markdown(path.read_text("utf-8"), THEOREMS)
    for path in sorted((ROOT / "src/dpdistill/bundle/templates").iterdir()):
        if path.suffix != ".css":
            text = path.read_text("utf-8")
            yield path.relative_to(ROOT).as_posix(), markdown(text) if path.suffix == ".md" else page(text)
    for name, names in CODE.items():
        yield name, strings((ROOT / name).read_text("utf-8"), names)


def says(phrase: str, sentence: str) -> bool:
    """Whether `sentence` is the one that `phrase` stands for: the same, with `...` for anything in the middle."""
    start, dots, end = phrase.partition(" ... ")
    if not dots:
        return sentence == phrase
    return len(sentence) > len(start) + len(end) and sentence.startswith(start) and sentence.endswith(end)


def faults(claims: list[dict[str, Any]], found: dict[str, list[str]]) -> list[str]:
    """What is wrong between a register and the privacy sentences of each file: one line each."""
    phrases = [
        (claim["id"], name, text) for claim in claims for name, texts in claim["where"].items() for text in texts
    ]
    lines = []
    for name, sentences in found.items():
        mapped = [(claim, text) for claim, where, text in phrases if where == name]
        for sentence in sentences:
            if not any(says(text, sentence) for _, text in mapped):
                lines.append(f"{name}: no claim is behind {sentence!r}: add it to `where` of one in docs/claims.toml")
        for claim, text in mapped:
            number = sum(says(text, sentence) for sentence in sentences)
            if number != 1:
                lines.append(f"docs/claims.toml: {claim}: {number} sentences of {name} are {text!r}, not 1")
    gone = {name for _, name, _ in phrases} - set(found)
    return lines + [f"docs/claims.toml: {name} is no page that is read" for name in sorted(gone)]


@functools.cache
def _tests(path: Path) -> frozenset[str]:
    """Names of the tests of a file."""
    tree = ast.parse(path.read_text("utf-8"))
    return frozenset(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def behind(test: str) -> bool:
    """Whether `tests/…/test_x.py::test_y` exists."""
    name, _, function = test.partition("::")
    path = ROOT / name
    return name.startswith("tests/") and path.is_file() and function in _tests(path)


def anchored(proof: str) -> bool:
    """Whether `docs/….md#heading` exists, by the anchors that GitHub gives headings."""
    name, _, anchor = proof.partition("#")
    path = ROOT / name
    if not (name.startswith("docs/") and path.is_file()):
        return False
    text = path.read_text("utf-8")
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return anchor in anchors | set(re.findall(r'<a id="([^"]+)">', text))


REGISTER = tomllib.loads((ROOT / "docs/claims.toml").read_text("utf-8"))["claim"]


def test_every_privacy_sentence_has_a_claim_behind_it() -> None:
    found = {name: promising(sentences) for name, sentences in pages()}
    assert sum(map(len, found.values())) > 300  # or the vocabulary has come to see nothing
    assert not faults(REGISTER, found), "\n".join(["", *faults(REGISTER, found)])


@pytest.mark.parametrize("claim", REGISTER, ids=lambda claim: claim["id"])
def test_a_claim_names_what_is_behind_it(claim: dict[str, Any]) -> None:
    kind = claim.get("kind", "promise")
    assert set(claim) <= {"id", "kind", "says", "proof", "tests", "where"}
    assert kind in ("promise", "limit", "aside")
    assert claim["says"].endswith(".")
    assert claim["where"]
    tests, proofs = claim.get("tests", []), claim.get("proof", [])
    assert kind != "promise" or tests  # a proof is about the mathematics; that the code does it is for a test
    assert kind != "limit" or proofs or tests
    assert [test for test in tests if not behind(test)] == []
    assert [proof for proof in proofs if not anchored(proof)] == []


def test_a_claim_has_one_name() -> None:
    names = [claim["id"] for claim in REGISTER]
    assert len(names) == len(set(names))


def test_every_test_that_a_page_names_exists() -> None:
    files = {path.relative_to(ROOT / "tests").as_posix(): path for path in (ROOT / "tests").rglob("test_*.py")}
    known = set().union(*map(_tests, files.values()))
    written = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for path in [path for path in written if path != ROOT / OTHERS]:
        text = path.read_text("utf-8")
        named = set(re.findall(r"\btest_[a-z0-9_]+\b(?!\.py)", text))
        assert named <= known, (path.name, named - known)
        for name in re.findall(r"(?:tests/)?(?:\w+/)*test_\w+\.py", text):
            assert any(f"tests/{file}".endswith(name if "/" in name else f"/{name}") for file in files), (
                path.name,
                name,
            )


SENTENCES = {"a.md": ["ε never grows, whoever looks at it.", "Noise is drawn once."]}
CLAIM = {"id": "x", "where": {"a.md": ["ε never grows ... looks at it.", "Noise is drawn once."]}}


def test_what_is_wrong_in_a_register_is_seen() -> None:
    assert faults([CLAIM], SENTENCES) == []
    planted = {"a.md": [*SENTENCES["a.md"], "No record is ever read twice."]}
    (line,) = faults([CLAIM], planted)
    assert "No record is ever read twice." in line
    assert "docs/claims.toml" in line
    longer = {"a.md": ["ε never grows, whoever looks at it, and nobody can.", "Noise is drawn once."]}
    assert len(faults([CLAIM], longer)) == 2  # a sentence that says more is another one, and its phrase stands for none
    assert len(faults([CLAIM], {"a.md": SENTENCES["a.md"][:1]})) == 1  # a sentence that is gone
    assert len(faults([CLAIM], {})) == 1  # a file that is gone
    twice = {"a.md": [*SENTENCES["a.md"], "ε never grows if nobody looks at it."]}
    assert len(faults([CLAIM], twice)) == 1  # one phrase for two sentences


def test_a_test_or_page_that_is_gone_is_seen() -> None:
    here = "tests/test_claims.py::test_a_test_or_page_that_is_gone_is_seen"
    assert behind(here)
    assert not behind(here + "_no_more")
    assert not behind("tests/test_claimed.py::test_a_claim_has_one_name")
    assert not behind("docs/trust.md")
    assert anchored("docs/privacy/votes.md#sensitivity-is-2q")
    assert anchored("docs/known-limits.md#rounding")
    assert not anchored("docs/privacy/votes.md#sensitivity")
    assert not anchored("docs/privacy/votes.md")
    assert not anchored("docs/privacy/nobody.md#statement")


def test_sentences_are_found_wherever_they_stand() -> None:
    text = """# Why ε never grows
```
code is never read
```
Records live behind *one*
[door](x.md). The sky is blue.
- a list: no record leaves
| head | head |
|---|---|
| `a` | the key is secret, always |
> **The noise is exact.**
"""
    assert promising(markdown(text)) == [
        "Why ε never grows",
        "Records live behind one door.",
        "a list: no record leaves",
        "a | the key is secret, always",
        "The noise is exact.",
    ]
    assert markdown("# Page\nOf ε.\n## Theorem\nε holds.\n## Proof\nIt never ends.\n", THEOREMS) == [
        "Of ε.",
        "ε holds.",
    ]
    html = "<p>The noise is\nexact: <b>{{ c.noise }}</b>.</p><li>No key leaves</li>{% if never %}<svg><text>never</text></svg>{% endif %}"
    assert promising(page(html)) == ["The noise is exact: ….", "No key leaves"]
    source = '''"""Never shown."""
WORDS = ("no key leaves",)
def f(x):
    """Never shown either."""
    raise ValueError("ε is never that")
@app.command()
def g(help="ε never grows"):
    """Shown: no record leaves."""
    print(f"ε is at most {x}. Blue sky.")
'''
    shown = ["no key leaves", "ε never grows", "Shown: no record leaves.", "ε is at most …."]
    assert sorted(promising(strings(source))) == sorted(shown)
    assert strings(source, ["WORDS"]) == ["no key leaves"]
    assert strings('def f():\n    """Not shown."""\n    return ["ε is at most 1."]', ["f"]) == ["ε is at most 1."]


def test_all_that_gives_advice_is_read() -> None:
    modules = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py")}
    assert {name for name, text in modules.items() if re.search(r"^def advice\(", text, re.MULTILINE)} == {
        name for name, names in CODE.items() if names == ("advice",)
    }
