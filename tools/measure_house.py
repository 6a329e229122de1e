"""Measure how dense the code of a package is: one column per folder, side by side.

python tools/measure_house.py [FOLDER ...] [--json FILE]

Without a folder it measures the package qdq. Give the folders of other packages, or of an older checkout, to compare:

git worktree add ../before v0.1.0
pip install --no-deps --target ../peer optimum-quanto
python tools/measure_house.py qdq ../before/qdq ../peer/optimum/quanto
"""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qdq.cli.main import run_command
from qdq.errors import ArgumentError
from qdq.files import write_json

_PACKAGE = Path(__file__).resolve().parents[1] / "qdq"
_LONG_FUNCTION = 60  # lines: about one screen
# Words that refer to a thing without saying what it is.
_PRONOUNS = frozenset(
    [
        "found",
        "own",
        "each",
        "other",
        "others",
        "kept",
        "given",
        "before",
        "after",
        "known",
        "one",
        "ones",
        "it",
        "this",
        "that",
        "these",
        "those",
        "such",
        "what",
        "both",
        "same",
    ]
)

_TITLES = (
    "folder",
    "files",
    "functions",
    "length: median / p95 / max",
    "functions over 60 lines, %",
    "complexity per line",
    "comprehensions per 100 statements",
    "conditional expressions per 100 statements",
    "names that are pronouns, %",
    "public functions with a docstring, %",
    "comments per 100 lines",
)

_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_DECISIONS = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.If,
    ast.IfExp,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.Assert,
    ast.match_case,
)


@dataclass(frozen=True)
class HouseRow:
    """The figures of one folder.

    Args:
        folder: Folder that was measured.
        files: Number of Python files.
        functions: Number of functions and methods, nested ones included.
        length_median: Lines of a function from `def` to its end, docstring included.
        length_p95: 95th percentile of these.
        length_max: Longest function.
        long_percent: Percentage of functions over 60 lines.
        complexity_per_line: Cyclomatic complexity of all functions (McCabe, with boolean operators and
            comprehensions) divided by their lines.
        comprehensions: Comprehensions and generator expressions per 100 statements.
        conditionals: Conditional expressions per 100 statements.
        pronoun_percent: Percentage of the names that functions bind which are pronouns.
        docstring_percent: Percentage of public functions and methods that have a docstring.
        comments: Comments per 100 lines.
    """

    folder: str
    files: int
    functions: int
    length_median: float
    length_p95: int
    length_max: int
    long_percent: float
    complexity_per_line: float
    comprehensions: float
    conditionals: float
    pronoun_percent: float
    docstring_percent: float
    comments: float


@dataclass
class _Counts:
    """Counts over the files of one folder."""

    files: int = 0
    lines: int = 0
    comments: int = 0
    statements: int = 0
    comprehensions: int = 0
    conditionals: int = 0
    names: int = 0
    pronouns: int = 0
    public_functions: int = 0
    docstrings: int = 0
    complexity: int = 0
    function_lines: int = 0
    lengths: list[int] = field(default_factory=list)

    def add_file(self, source: str) -> None:
        """Add the counts of a file."""
        self.files += 1
        self.lines += len(source.splitlines())
        tree = ast.parse(source)
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self.comments += sum(token.type == tokenize.COMMENT for token in tokens)
        for node in ast.walk(tree):
            self.statements += isinstance(node, ast.stmt)
            self.comprehensions += isinstance(node, _COMPREHENSIONS)
            self.conditionals += isinstance(node, ast.IfExp)
            if isinstance(node, _FunctionNode):
                self.add_function(node)
        for function in _outermost_functions(tree):
            self.complexity += _measure_complexity(function)
            self.function_lines += _count_lines(function)
        for function in _public_functions(tree):
            self.public_functions += 1
            self.docstrings += ast.get_docstring(function) is not None

    def add_function(self, function: _FunctionNode) -> None:
        """Add the length and the names of a function."""
        self.lengths.append(_count_lines(function))
        names = _bound_names(function)
        self.names += len(names)
        self.pronouns += len(names & _PRONOUNS)

    def summarize(self, folder: str) -> HouseRow:
        """The figures that follow from the counts."""
        lengths = sorted(self.lengths)
        long_functions = sum(length > _LONG_FUNCTION for length in lengths)
        return HouseRow(
            folder=folder,
            files=self.files,
            functions=len(lengths),
            length_median=statistics.median(lengths),
            length_p95=lengths[int(0.95 * len(lengths))],
            length_max=lengths[-1],
            long_percent=_percent(long_functions, len(lengths)),
            complexity_per_line=self.complexity / self.function_lines,
            comprehensions=_percent(self.comprehensions, self.statements),
            conditionals=_percent(self.conditionals, self.statements),
            pronoun_percent=_percent(self.pronouns, self.names),
            docstring_percent=_percent(self.docstrings, self.public_functions),
            comments=_percent(self.comments, self.lines),
        )


def measure_house(*folders: Path, json: Path | None = None) -> int:
    """Print one row of figures for each package folder.

    Args:
        folders: Folders with Python files; the package qdq if left out.
        json: Also write the figures to this file.
    """
    rows = list(map(measure_folder, folders or (_PACKAGE,)))
    print(format_rows(rows))
    if json:
        write_json(json, {"rows": list(map(asdict, rows))})
    return 0


def measure_folder(folder: Path) -> HouseRow:
    """Measure all Python files in a folder and below it.

    Raises:
        ArgumentError: The folder has no function in Python, or a file that Python cannot parse.
    """
    counts = _Counts()
    for path in sorted(folder.rglob("*.py")):
        try:
            counts.add_file(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError) as error:
            raise ArgumentError(
                f"{path} is not Python: {error}.",
                "give the folder of a package.",
            ) from error
    if not counts.lengths:
        raise ArgumentError(
            f"{folder} contains no function in Python.",
            "give the folder of a package.",
        )
    return counts.summarize(str(folder))


def format_rows(rows: list[HouseRow]) -> str:
    """A table with one figure per line and one folder per column."""
    columns = [_TITLES, *map(_format_cells, rows)]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for title, *figures in zip(*columns, strict=True):
        cells = [title.ljust(widths[0]), *map(str.rjust, figures, widths[1:])]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _format_cells(row: HouseRow) -> tuple[str, ...]:
    return (
        row.folder,
        f"{row.files}",
        f"{row.functions}",
        f"{row.length_median:g} / {row.length_p95} / {row.length_max}",
        f"{row.long_percent:.1f}",
        f"{row.complexity_per_line:.3f}",
        f"{row.comprehensions:.2f}",
        f"{row.conditionals:.2f}",
        f"{row.pronoun_percent:.2f}",
        f"{row.docstring_percent:.1f}",
        f"{row.comments:.1f}",
    )


def _outermost_functions(tree: ast.AST) -> Iterator[_FunctionNode]:
    """Functions and methods that are not inside another function."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, _FunctionNode):
            yield child
        else:
            yield from _outermost_functions(child)


def _public_functions(tree: ast.AST) -> Iterator[_FunctionNode]:
    """Functions and methods without an underscore, in the module and in its public classes.

    A function inside a function is an implementation detail, and so is a method of a private class. A setter and an
    overload are documented with the function that they belong to.
    """
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, _FunctionNode):
            if not child.name.startswith("_") and not _has_decorator(child, "setter", "overload"):
                yield child
        elif isinstance(child, ast.ClassDef):
            if not child.name.startswith("_"):
                yield from _public_functions(child)
        else:
            yield from _public_functions(child)


def _has_decorator(function: _FunctionNode, *names: str) -> bool:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Attribute) and decorator.attr in names:
            return True
        if isinstance(decorator, ast.Name) and decorator.id in names:
            return True
    return False


def _measure_complexity(function: _FunctionNode) -> int:
    """Cyclomatic complexity of a function and of the functions inside it.

    One for each function, and one for each decision: branch, loop, handler, assertion, `and`, `or`, comprehension and
    its filters (McCabe, "A Complexity Measure", IEEE TSE 1976).
    """
    complexity = 0
    for node in ast.walk(function):
        if isinstance(node, _DECISIONS):
            complexity += 1
        elif isinstance(node, ast.BoolOp):
            complexity += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            complexity += 1 + len(node.ifs)
    return complexity


def _count_lines(function: _FunctionNode) -> int:
    """Lines from `def` to the end."""
    assert function.end_lineno is not None  # noqa: S101 - the parser sets it
    return function.end_lineno - function.lineno + 1


def _bound_names(function: _FunctionNode) -> set[str]:
    """Parameters and variables of a function."""
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _percent(part: int, total: int) -> float:
    return 100 * part / total if total else 0.0


if __name__ == "__main__":
    run_command(measure_house)
