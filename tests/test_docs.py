"""The rendered book: whole, linked, and closed to the network."""
import io
import json
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from conftest import ROOT

from golf.docs import page_name, runs_table


@pytest.fixture(scope='module')
def book(tmp_path_factory):
    "A copy of the project with its docs built: the folder `_docs`."
    root = tmp_path_factory.mktemp('book')/'golf'
    skip = shutil.ignore_patterns('.*', '__pycache__', 'checkpoint')
    for name in ('golf', 'nbs', 'params', 'runs'):
        shutil.copytree(ROOT/name, root/name, ignore=skip)
    for name in ('settings.ini', 'pyproject.toml'):
        shutil.copy(ROOT/name, root)
    done = subprocess.run([sys.executable, '-m', 'golf', 'docs'], cwd=root,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root/'_docs'


class Page(HTMLParser):
    "Anchors and links of a page."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(path.read_text('utf8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs.get('id'), attrs.get('name')}
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]


def test_every_chapter_and_kept_run_is_a_page(book):
    "No notebook is forgotten."
    made = {p.relative_to(book).as_posix() for p in book.rglob('*.html')}
    for path in (ROOT/'nbs').glob('*.ipynb'):
        assert f'{page_name(path.name)}.html' in made
    for path in (ROOT/'runs').glob('*/result.json'):
        assert f'runs/{path.parent.name}.html' in made


def test_every_link_leads_somewhere(book):
    "Files exist, and so do anchors, those of source lines included."
    pages = {p: Page(p) for p in book.rglob('*.html')}
    checked = 0
    for path, page in pages.items():
        for link in page.links:
            if link.startswith(('http', 'data:', 'mailto:')): continue
            file, _, anchor = unquote(link).partition('#')
            target = (path.parent/file).resolve() if file else path
            if target.is_dir(): target /= 'index.html'
            assert target.is_file(), f'{path.name}: {link}'
            if anchor and target in pages:
                assert anchor in pages[target].ids, f'{path.name}: {link}'
                checked += 1
    assert checked > 500


def test_formulas_need_no_network(book):
    "KaTeX and every font that its style sheet prefers are in the site."
    text = (book/'muon.html').read_text('utf8')
    assert 'katex/katex.min.js' in text and 'class="math' in text
    css = (book/'katex/katex.min.css').read_text()
    fonts = [part.split(')')[0] for part in css.split('url(')[1:]]
    woff2 = [f for f in fonts if f.endswith('.woff2')]
    assert len(woff2) == 20
    for name in woff2: assert (book/'katex'/name).is_file()


def test_search_knows_every_page(book):
    "Chapters and runs are in the search index."
    pages = {e['href'].partition('#')[0] for e in
             json.loads((book/'search.json').read_text())}
    assert {'muon.html', 'index.html', 'run.html'} <= pages
    assert any(p.startswith('runs/') for p in pages)


def test_first_page_shows_the_kept_runs(tmp_path):
    "The stored table is of the runs as committed: `make run` makes others."
    kept = subprocess.run(['git', 'archive', '--format=zip', 'HEAD', 'runs'],
                          cwd=ROOT, check=True, capture_output=True).stdout
    with zipfile.ZipFile(io.BytesIO(kept)) as archive:
        archive.extractall(tmp_path)
    cells = json.loads((ROOT/'nbs/index.ipynb').read_text())['cells']
    shown = [''.join(o['data'].get('text/markdown', '')) for c in cells
             for o in c.get('outputs', [])]
    assert runs_table(tmp_path) in shown, 'run nbs/index.ipynb again'


@pytest.mark.parametrize('page', sorted(
    p.stem for p in (ROOT/'nbs').glob('8*_pr*.ipynb')))
def test_a_system_shows_its_runs(page):
    "The table on its page is that of the runs that are kept now."
    cells = json.loads((ROOT/f'nbs/{page}.ipynb').read_text())['cells']
    shown = [''.join(o.get('data', {}).get('text/markdown', ''))
             for c in cells for o in c.get('outputs', [])]
    assert runs_table(ROOT, page[3:]) in shown, f'run nbs/{page}.ipynb again'
    assert (ROOT/f'params/{page[3:]}.yaml').is_file()
