"""How do the chapters read? A table, no verdict.

    python tests/chapters.py

prose   Markdown cells for each code cell
lines   median, 90th percentile and maximum of a code cell's lines, without
        blank ones and `#|` directives
used    exported cells (imports apart) of whose names one occurs in the next
        three code cells
"""
import ast
import json
import re
from pathlib import Path
from statistics import median

NBS = Path(__file__).resolve().parent.parent/'nbs'
ROW = '{:15}{:>7}{:>7}{:>8}{:>6}{:>6}{:>10}{:>7}{:>8}'


def read_cells(path):
    "(type, source) of every cell that a reader sees as text or code."
    cells = json.loads(Path(path).read_text('utf8'))['cells']
    return [(c['cell_type'], ''.join(c['source'])) for c in cells
            if ''.join(c['source']).strip()
            and '#| default_exp' not in ''.join(c['source'])]


def count_lines(source):
    "Lines of code, without blank ones and directives."
    return sum(1 for line in source.splitlines()
               if line.strip() and not line.startswith('#|'))


def exported_names(source):
    "What an exported cell defines; nothing if it only imports."
    if not re.match(r'#\| exports?\b', source): return []
    body = ast.parse(source).body
    named = [[n.name] if hasattr(n, 'name') else
             [t.id for t in getattr(n, 'targets', [])
              if isinstance(t, ast.Name)] for n in body]
    return [name for names in named for name in names]


def measure(path):
    "The row of one chapter."
    cells = read_cells(path)
    code = [s for kind, s in cells if kind == 'code']
    lines = sorted(map(count_lines, code))
    made = [(i, names) for i, s in enumerate(code)
            if (names := exported_names(s))]
    used = sum(any(re.search(rf'\b{n}\b', s) for n in names
                   for s in code[i + 1:i + 4]) for i, names in made)
    return dict(chapter=path.stem, prose=len(cells) - len(code),
                code=len(code), lines=lines, exported=len(made), used=used)


def total(rows):
    "The row of all chapters together."
    sums = {k: sum(r[k] for r in rows)
            for k in ('prose', 'code', 'exported', 'used')}
    return dict(chapter='all', **sums,
                lines=sorted(n for r in rows for n in r['lines']))


def text(row):
    "One row as a line of the table."
    lines, n = row['lines'], max(row['exported'], 1)
    return ROW.format(
        row['chapter'], row['prose'], row['code'],
        f'{row["prose"]/row["code"]:.2f}', f'{median(lines):g}',
        lines[int(.9*(len(lines) - 1))], lines[-1], row['exported'],
        f'{row["used"]/n:.0%}' if row['exported'] else '')


if __name__ == '__main__':
    rows = [measure(p) for p in sorted(NBS.glob('[0-9]*.ipynb'))]
    print(ROW.format('chapter', 'prose', 'code', 'ratio', 'med', 'p90',
                     'longest', 'exp', 'used'))
    for row in [*rows, total(rows)]: print(text(row))
