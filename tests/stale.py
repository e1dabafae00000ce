"""Is every generated file what its source gives?

    python tests/stale.py          name the stale files, exit 1 if any
    python tests/stale.py --mend   write them anew

Sources are the notebooks: `golf/` is their export, a committed notebook is
clean, README.md is `nbs/index.ipynb` as Markdown, and its pictures are
those of a kept run. Files are compared before and after, so that
uncommitted work does not count as stale.
"""
import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = 'golf/*.py', 'nbs/*.ipynb', 'nbs/images/*.png', 'README.md'
RUN = 'runs/pr576+onegpu-s1337.ipynb'  # the run on the first page
PICTURES = {'curves': 'plot_loss(lines', 'stages': 'plot_stages(result'}
HEAD = ('<!-- made from nbs/index.ipynb by `make sync`; '
        'edit the notebook -->\n\n')


def readme(notebook):
    "The Markdown of an index notebook; links lead into nbs/."
    cells = json.loads(Path(notebook).read_text('utf8'))['cells']
    parts = []
    for cell in cells:
        text = ''.join(cell['source']).strip()
        if cell['cell_type'] == 'markdown':
            parts.append(text)
        elif text and '#| hide' not in text:
            if '#| echo: false' not in text:
                parts.append(f'```python\n{text}\n```')
            for out in cell['outputs']:
                data = out.get('data', {})
                made = data.get('text/markdown') or data.get('text/plain')
                if made: parts.append(''.join(made))
    text = '\n\n'.join(p for p in parts if p)
    text = re.sub(r'\]\((\d\d_\w+\.ipynb|images/)', r'](nbs/\1', text)
    return HEAD + text.replace('](../', '](') + '\n'


def stored_picture(notebook, source):
    "The PNG that the cell with this source put out."
    for cell in json.loads(Path(notebook).read_text('utf8'))['cells']:
        if source not in ''.join(cell['source']): continue
        for out in cell.get('outputs', []):
            if png := out.get('data', {}).get('image/png'):
                return base64.b64decode(png)
    raise ValueError(f'{notebook}: no picture of {source}')


def hashes(root):
    "{path: sha256} of every generated file."
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes())
            .hexdigest() for g in MADE for p in sorted(root.glob(g))}


def mend(root):
    "Write every generated file of a checkout anew."
    bin_ = Path(sys.executable).parent
    for tool in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([bin_/tool], cwd=root, check=True)
    (root/'nbs/images').mkdir(exist_ok=True)
    for name, source in PICTURES.items():
        (root/f'nbs/images/{name}.png').write_bytes(
            stored_picture(root/RUN, source))
    (root/'README.md').write_text(readme(root/'nbs/index.ipynb'), 'utf8')


def stale(root):
    "The generated files that their sources do not give."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp, root.name)
        for name in ('golf', 'nbs'): shutil.copytree(root/name, copy/name)
        (copy/'runs').mkdir()
        for name in ('settings.ini', 'pyproject.toml', 'README.md', RUN):
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
