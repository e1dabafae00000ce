"""Is every generated file what its source gives?

    python tests/stale.py          name the stale files, exit 1 if any
    python tests/stale.py --mend   write them anew

Sources are the notebooks: `golf/` is their export, a committed notebook is
clean, and README.md is `nbs/index.ipynb` as Markdown. Files are compared
before and after, so that uncommitted work does not count as stale.
"""
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = 'golf/*.py', 'nbs/*.ipynb', 'README.md'
HEAD = ('<!-- made from nbs/index.ipynb by `make sync`; '
        'edit the notebook -->\n\n')


def readme(notebook):
    "The Markdown of an index notebook; links lead into nbs/."
    cells = json.loads(Path(notebook).read_text('utf8'))['cells']
    parts = []
    for cell in cells:
        text = ''.join(cell['source']).strip()
        if cell['cell_type'] == 'markdown':
            text = re.sub(r'\]\((\d\d_\w+\.ipynb)', r'](nbs/\1', text)
            parts.append(text.replace('](../', ']('))
        elif text and '#| hide' not in text:
            parts.append(f'```python\n{text}\n```')
            for out in cell['outputs']:
                data = out.get('data', {})
                made = data.get('text/markdown') or data.get('text/plain')
                if made: parts.append(''.join(made))
    return HEAD + '\n\n'.join(p for p in parts if p) + '\n'


def hashes(root):
    "{path: sha256} of every generated file."
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes())
            .hexdigest() for g in MADE for p in sorted(root.glob(g))}


def mend(root):
    "Write every generated file of a checkout anew."
    bin_ = Path(sys.executable).parent
    for tool in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([bin_/tool], cwd=root, check=True)
    (root/'README.md').write_text(readme(root/'nbs/index.ipynb'), 'utf8')


def stale(root):
    "The generated files that their sources do not give."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp, root.name)
        for name in ('golf', 'nbs'): shutil.copytree(root/name, copy/name)
        for name in ('settings.ini', 'pyproject.toml', 'README.md'):
            shutil.copy(root/name, copy/name)
        before = hashes(copy)
        mend(copy)
        after = hashes(copy)
    return sorted(k for k in before.keys() | after.keys()
                  if before.get(k) != after.get(k))


if __name__ == '__main__':
    if '--mend' in sys.argv: mend(ROOT)
    elif found := stale(ROOT):
        sys.exit(f'stale: {", ".join(found)} — run `make sync` and commit')
    else: print('nothing stale')
