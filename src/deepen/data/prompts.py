"""Prompts made from texts: what somebody may ask of a small model about a question, a function or a passage.

A prompt is a record with nothing in it but `prompt` (formats.py). Each is made from another source, in whose split it
is: a passage that is rewritten is in the split that it is in as a text of the corpus `wiki`, and so is what is asked
about it. How it is put is drawn by a generator that the source seeds: the same sources give the same prompts.
"""

import ast
import random
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, dropwhile

from deepen.data.records import Record

# A tokenizer may take what looks like this for a special token, which no message may have written out.
_SPECIAL_LOOKING = re.compile(r"<\|?\w+\|?>")

# Questions


QUESTION_CHARACTERS = 200
"""Of a question that is asked, at most."""

_QUESTION_WORDS = {
    "am", "are", "can", "could", "did", "do", "does", "had", "has", "have", "how", "is", "may", "should", "was", "were",
    "what", "when", "where", "which", "who", "whom", "whose", "why", "will", "would",
}  # fmt: skip
_OF_SUBJECT = (
    "Tell me about {subject}.",
    "Give me five facts about {subject}.",
    "What should everybody know about {subject}?",
    "I have to give a talk on {subject}. What could I say?",
    "Write a short introduction to {subject} for a school newspaper.",
    "Write a letter to a friend in which you tell about {subject}.",
    "Explain {subject} to a child of ten years.",
    "Write three quiz questions about {subject}, each with its answer.",
    "Write a short story in which {subject} plays a part.",
    "Why might somebody want to learn about {subject}?",
)
_OF_YES_OR_NO = (
    "{question} Explain why or why not.",
    "{question} Give me the reasons in a few sentences.",
    "{question} What speaks for it, and what against it?",
    "A friend asked me: {question} How would you answer, and why?",
    "I am not sure about this: {question} Please explain it step by step.",
)
_OF_FACT = (
    "{question} Answer in a short paragraph.",
    "{question} Please explain the background as well.",
    "{question} Tell me what else is worth knowing about it.",
    "A pupil of mine asked: {question} Write an answer that I can read out in class.",
    "I would like to understand this better: {question}",
)
_OF_ANY = ("{question}", "{question} Explain your answer.", "{question} Please answer in detail.")


def chat_prompts(passages: Iterable[Record], facts: Iterable[Record], questions: Iterable[Record]) -> Iterator[Record]:
    """Questions and requests that ask for more than a word.

    From each subject in `passages` (fields `passage`, which begins "Subject -- ", and a `question` for yes or no): one
    about the subject or one about the question. From `facts` and `questions` (field `question`): one of each question.
    """
    return _fit(chain(_about_passages(passages), _about(facts, _OF_FACT), _about(questions, _OF_ANY)))


def _about_passages(passages: Iterable[Record]) -> Iterator[Record]:
    subjects = set[str]()
    for record in passages:
        passage = record.text("passage")
        subject = passage.partition(" -- ")[0].removeprefix("List of ")
        if subject in subjects:
            continue
        subjects.add(subject)
        source = _source_of(passage)
        question = _question(record)
        if question is not None and source.random() < 0.5:
            yield _record(source.choice(_OF_YES_OR_NO).format(question=question), record, made_from=passage)
        else:
            yield _record(source.choice(_OF_SUBJECT).format(subject=subject), record, made_from=passage)


def _about(questions: Iterable[Record], forms: Sequence[str]) -> Iterator[Record]:
    for record in questions:
        question = _question(record)
        if question is not None:
            yield _record(_source_of(question).choice(forms).format(question=question), record, made_from=question)


def _question(record: Record) -> str | None:
    """As one writes it; None for what is none, as what people type into a search."""
    words = record.text("question").strip().rstrip("?. ")
    first = re.match(r"\w+", words)
    if first is None or first[0].lower() not in _QUESTION_WORDS or len(words) > QUESTION_CHARACTERS:
        return None
    return f"{words[0].upper()}{words[1:]}?"


# Functions


FUNCTION_CHARACTERS = 480
"""Of a function that is asked about, at most."""

PER_FILE = 40
"""Functions of a file that are asked about, at most."""

_FEWEST_STATEMENT_LINES = 2
_SUMMARY_CHARACTERS = range(20, 300)


@dataclass(frozen=True)
class _Function:
    """A function in pieces: its head, the first paragraph of its docstring, and all of it but the docstring."""

    name: str
    head: str
    summary: str
    code: str

    @property
    def nameless(self) -> str:
        """Its code, the same for functions that differ in their name alone."""
        return re.sub(rf"\b{self.name}\b", "function", self.code)


_OF_FUNCTION: tuple[str, ...] = (
    "Complete this Python function. Print all of it.\n\n{started}",
    "Write the body of this Python function:\n\n{started}",
    "Write a Python function `{name}` for this purpose, with an example of its use: {summary}",
    "Explain what this Python function does.\n\n{code}",
    "Explain this Python function line by line.\n\n{code}",
    "Write a docstring for this Python function and print the whole function again.\n\n{code}",
    "Add comments to this Python function and print the whole function again.\n\n{code}",
    "Add type annotations to this Python function and print the whole function again.\n\n{code}",
    "Rename the function `{name}` to `{other}` and print the whole function again.\n\n{code}",
    "Write a unit test for this Python function.\n\n{code}",
    "What could go wrong in this Python function? Print a safer version of it.\n\n{code}",
)


def code_prompts(files: Iterable[Record]) -> Iterator[Record]:
    """Tasks about documented functions of at most FUNCTION_CHARACTERS in Python files, PER_FILE of a file at most.

    Left out are tests, files that don't parse under this Python, and functions that differ from an earlier one in their
    name alone. The split goes by the function: too few files have any to go by files.
    """
    return _fit(_about_functions(files))


def _about_functions(files: Iterable[Record]) -> Iterator[Record]:
    seen = set[str]()
    for file in files:
        text = file.text("text")
        functions = {each.nameless: each for each in _functions(text) if each.nameless not in seen}
        seen.update(functions)
        for function in _source_of(text).sample(list(functions.values()), min(PER_FILE, len(functions))):
            yield _record(_about_function(function), file, made_from=function.nameless)


def _about_function(function: _Function) -> str:
    form = _source_of(function.code).choice(_OF_FUNCTION)
    started = f'{function.head}\n    """{function.summary}"""'
    return form.format(
        name=function.name,
        other=f"new_{function.name.lstrip('_')}",
        summary=function.summary,
        started=_fenced(started),
        code=_fenced(function.code),
    )


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def _functions(text: str) -> list[_Function]:
    """In the order of the file, those that may be asked about."""
    if "def test" in text:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    lines = text.split("\n")
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    found = (_function(node, lines) for node in sorted(nodes, key=lambda node: node.lineno))
    return [each for each in found if each is not None]


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> _Function | None:
    """None for a function that isn't documented, is too short or too long, or isn't laid out as most are."""
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) < 2 or node.name.startswith("__"):
        return None
    first, second = node.body[:2]
    assert first.end_lineno is not None and node.end_lineno is not None, "what was parsed has its lines"
    if first.lineno == node.lineno or second.lineno == first.end_lineno:
        return None
    head_lines = lines[node.lineno - 1 : first.lineno - 1]
    statements = list(dropwhile(lambda line: not line.strip(), lines[first.end_lineno : node.end_lineno]))
    head = textwrap.dedent("\n".join(head_lines)).rstrip()
    code = textwrap.dedent("\n".join((*head_lines, *statements))).rstrip()
    summary = " ".join(docstring.split("\n\n")[0].split())
    is_fit = (
        len(code) <= FUNCTION_CHARACTERS
        and sum(re.match(r"\s*[^\s#]", line) is not None for line in statements) >= _FEWEST_STATEMENT_LINES
        and len(summary) in _SUMMARY_CHARACTERS
        and code.startswith(("def ", "async def "))
        and "```" not in code
    )
    return _Function(node.name, head, summary, code) if is_fit else None


# Passages


PASSAGE_WORDS = range(40, 121)
"""Of a passage that is to be rewritten."""

PASSAGE_CHARACTERS = 720
"""Of such a passage, at most."""

_ERROR_SHARE = 0.2
_WRONG_WORDS = {
    "is": "are", "are": "is", "was": "were", "were": "was", "has": "have", "have": "has", "its": "it's",
    "their": "there", "than": "then", "a": "an", "an": "a", "the": "", "of": "", "to": "",
}  # fmt: skip
_FEWEST_LETTERS = 5


def rewriting_prompts(passages: Iterable[Record]) -> Iterator[Record]:
    """A task for each text in `passages` of PASSAGE_WORDS words: to put it otherwise, shorten it, or mend it.

    What stands before " -- " is a title and no part of the passage.
    """
    return _fit(_rewritings(passages))


def _rewritings(passages: Iterable[Record]) -> Iterator[Record]:
    for record in passages:
        text = record.text("text")
        passage = text.partition(" -- ")[2].replace("``", '"').replace("''", '"').strip()
        if len(passage.split()) in PASSAGE_WORDS and len(passage) <= PASSAGE_CHARACTERS:
            source = _source_of(text)
            yield _record(source.choice(_OF_PASSAGE)(passage, source), record, made_from=text)


def _told(task: str) -> Callable[[str, random.Random], str]:
    return lambda passage, source: f"{task}\n\n{passage}"


def _mend(passage: str, source: random.Random) -> str:
    return f"Correct the spelling and grammar of this text.\n\n{with_errors(passage, source)}"


def _replace(passage: str, source: random.Random) -> str:
    """To replace one of its longest words."""
    words = sorted(set(re.findall(r"\b[a-z]{5,}\b", passage)), key=lambda word: (-len(word), word))
    if not words:
        return _mend(passage, source)
    word = source.choice(words[:5])
    return f"Print this text again with the word '{word}' in capital letters.\n\n{passage}"


_OF_PASSAGE: tuple[Callable[[str, random.Random], str], ...] = (
    _told("Rewrite the following text in simpler words."),
    _told("Rewrite this text so that a child can understand it."),
    _told("Say the following in your own words."),
    _told("Summarise the following text in two sentences."),
    _told("Make this text shorter without leaving out a fact."),
    _told("Turn the following text into a list of bullet points."),
    _told("Rewrite the following text in a more formal style."),
    _told("Rewrite this text in a friendly tone, as in a letter."),
    _told("Print this text again with each sentence on a line of its own."),
    _replace,
    _mend,
    _mend,
    _mend,
)


def with_errors(text: str, source: random.Random) -> str:
    """`text` with some of its words misspelt, left out or in a wrong form; at least one, or its first word twice."""
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if word in _WRONG_WORDS or _is_spelt(word)]
    if not places:
        return f"{words[0]} {text}"
    wrong = {place for place in places if source.random() < _ERROR_SHARE} or {source.choice(places)}
    changed = (_wrong(word, source) if place in wrong else word for place, word in enumerate(words))
    return " ".join(word for word in changed if word)


def _is_spelt(word: str) -> bool:
    """Whether it can be misspelt so that it shows: letters alone, and inside not all the same."""
    return len(word) >= _FEWEST_LETTERS and word.isalpha() and len(set(word[1:-1])) > 1


def _wrong(word: str, source: random.Random) -> str:
    """Another word than this one, or none."""
    if word in _WRONG_WORDS:
        return _WRONG_WORDS[word]
    place = source.choice([place for place in range(1, len(word) - 2) if word[place] != word[place + 1]])
    swapped = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return source.choice((swapped, word[:place] + word[place + 1 :]))


# All of them


def _source_of(text: str) -> random.Random:
    return random.Random(text)


def _record(prompt: str, source: Record, *, made_from: str) -> Record:
    return Record({"prompt": prompt}, source.place, made_from)


def _fit(found: Iterable[Record]) -> Iterator[Record]:
    """Those that any tokenizer takes, and no prompt twice."""
    asked = set[str]()
    for made in found:
        prompt = made.fields["prompt"]
        if prompt not in asked and not _SPECIAL_LOOKING.search(prompt):
            asked.add(prompt)
            yield made
