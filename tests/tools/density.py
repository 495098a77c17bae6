"""How dense a Python file is to read: `python tests/tools/density.py cspine.py`.

What tires a reader is the tokens in a line, not the lines. A code line holds a token that
is no comment and no docstring; a statement's syntax nodes are counted without the
statements inside it.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

BLANK = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
    tokenize.COMMENT,
}
MOST_TOKENS = 15  # of a line, on average over a function
SHORT = 3  # code lines; shorter functions are not judged
MANY_NODES = 45  # syntax nodes of a statement


class Function(NamedTuple):
    """A function's name, its first line, its code lines, and tokens in each on average."""
    name: str
    line: int
    lines: int
    tokens: float


def is_text(node):
    """Whether a statement is nothing but a string."""
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return text and isinstance(node.value.value, str)


def docstring_lines(tree):
    """The numbers of all lines of docstrings."""
    lines = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and is_text(body[0]):
            lines.update(range(body[0].lineno, body[0].end_lineno + 1))
    return lines


def tokens_of(source):
    """{number of a code line: tokens that begin in it}."""
    hidden = docstring_lines(ast.parse(source))
    tokens = {}
    depth = 0  # Python 3.12 and later take an f-string apart; here it is one token
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        first, last = token.start[0], token.end[0]
        name = tokenize.tok_name[token.type]
        depth -= name == "FSTRING_END"
        inside = depth > 0 or name == "FSTRING_END"
        depth += name == "FSTRING_START"
        if token.type in BLANK or first in hidden or inside:
            continue
        for line in range(first, last + 1):  # a long string is code in each of its lines
            tokens.setdefault(line, 0)
        tokens[first] += 1
    return tokens


def tokens_a_line(source):
    """Tokens of a code line, on average over a file."""
    tokens = tokens_of(source)
    return sum(tokens.values()) / max(1, len(tokens))


def functions_of(source):
    """Every Function of a file."""
    tokens = tokens_of(source)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            inside = range(node.lineno, node.end_lineno + 1)
            counts = [tokens[line] for line in inside if line in tokens]
            mean = sum(counts) / max(1, len(counts))
            found.append(Function(node.name, node.lineno, len(counts), mean))
    return found


def own_nodes(statement):
    """Syntax nodes of a statement without the statements inside it."""
    count, waiting = 0, [statement]
    while waiting:
        node = waiting.pop()
        count += 1
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.stmt, ast.ExceptHandler)):
                waiting.append(child)
    return count


def statements_of(source):
    """[(syntax nodes, line)] of every statement but definitions and docstrings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        defines = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if isinstance(node, ast.stmt) and not defines and not is_text(node):
            found.append((own_nodes(node), node.lineno))
    return found


def dense_functions(source):
    """The functions of more than SHORT code lines and more than MOST_TOKENS a line."""
    return [f for f in functions_of(source) if f.tokens > MOST_TOKENS and f.lines > SHORT]


def large_statements(source):
    """The lines of statements of MANY_NODES or more."""
    return [line for nodes, line in statements_of(source) if nodes >= MANY_NODES]


def public_definitions(source):
    """The functions and classes, and the methods of classes, whose names are no secret."""
    tree = ast.parse(source)
    owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    for owner in owners:
        for node in owner.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                if not node.name.startswith("_"):
                    yield owner, node


def main():
    """Print a line a file that the command line names."""
    for path in sys.argv[1:]:
        source = Path(path).read_text()
        dense = dense_functions(source)
        large = large_statements(source)
        lines = source.splitlines()
        print(f"{path}: {len(lines)} lines, widest {max(map(len, lines))}, "
              f"{len(source.encode()) / 1024:.1f} KiB, "
              f"{tokens_a_line(source):.1f} tokens a code line; "
              f"{len(dense)} functions over {MOST_TOKENS}; "
              f"{len(large)} statements of {MANY_NODES} nodes or more")


if __name__ == "__main__":
    main()
