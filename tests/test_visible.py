"""Every page runs from what a reader sees: its code cells, less those that the site does not show.

What a reader sees. A cell is hidden if it says `#| hide`, `#| include: false` or `#| echo: false`. Cells that are exported are not
shown either: the site puts their documentation there, and a reader has the installed package in their place. So each name that a shown
cell uses must be built in, made by a shown cell, or imported by one; a star import brings what the module really gives.

What is checked. Names, of all pages: at the level of a cell, in a class or a comprehension a name must be there by then, in a function
anywhere on the page. Pages for users (start page, tutorials, "How to") take no private name from the package. And these pages run, the
shown cells in a namespace of their own. Their hidden cells run in between, beside it: what they make is for hidden cells only, and
warning filters, random state, `sys.path`, plot settings and fastai's defaults are put back after each, so they can check a lesson and
cannot help it. That is the only run of these pages in the tests.
"""
import ast, builtins, json, linecache, os, random, re, symtable, sys, types, warnings
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
pages = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts and p.parts[-2][0] != '_')
for_users = [p for p in pages if p.stem == 'index' or p.parent.name in ('tutorials', 'howto')]


class Cell:
    "A code cell of a page"
    def __init__(self, page, id, source):
        self.page, self.id, self.source = page, id, source
        self.directives = re.findall(r'^#\|\s*(.+?)\s*$', source, re.M)

    @property
    def shown(self): return not any(re.match(r'hide|export|default_exp|(include|echo):\s*false', d) for d in self.directives)


def cells(page): return [Cell(page, c['id'], ''.join(c['source'])) for c in json.loads(page.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']


@cache
def starred(module):
    "What `from module import *` brings"
    m = import_module(module)
    return frozenset(getattr(m, '__all__', None) or (k for k in vars(m) if not k.startswith('_')))


def imports(source): return [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]


class Names:
    "The names that a cell makes, uses at once, and uses in its functions when they are called"
    def __init__(self, source):
        self.made, self.now, self.later = set(), set(), set()
        for n in imports(source):
            if n.names[0].name == '*': self.made |= starred(n.module)
        self.visit(symtable.symtable(source, 'cell', 'exec'), True)

    def visit(self, table, now):
        top = table.get_type() == 'module'
        now = now and (table.get_type() != 'function' or table.get_name() in ('listcomp', 'setcomp', 'dictcomp', 'genexpr'))
        for s in table.get_symbols():
            if (s.is_assigned() or s.is_imported()) and (top or s.is_declared_global()): self.made.add(s.get_name())
            if s.is_referenced() and (top or s.is_global()): (self.now if now else self.later).add(s.get_name())
        for t in table.get_children(): self.visit(t, now)


def lost(cells):
    "`(id of the cell, name)` for each name that is used and that nothing shown has made"
    shown = [(c, Names(c.source)) for c in cells if c.shown]
    anywhere = {*vars(builtins), '__name__', '__file__'}.union(*(n.made for _, n in shown))
    there, res = {*vars(builtins), '__name__'}, []
    for c, n in shown:
        there |= n.made
        res += [(c.id, k) for k in sorted((n.now - there) | (n.later - anywhere))]
    return res


def page_of(*sources): return [Cell(None, str(i), s) for i, s in enumerate(sources)]


def test_a_lost_name_is_found():
    "The check itself"
    assert lost(page_of('#| hide\nimport json', 'json.dumps(1)')) == [('1', 'json')]
    assert lost(page_of('#| export\ndef f(): pass', 'f()')) == [('1', 'f')]
    assert lost(page_of('[a for _ in range(3)]', 'a = 1')) == [('0', 'a')]
    assert lost(page_of('def f(): return a', 'a = 1')) == []
    assert lost(page_of('def f(): return a')) == [('0', 'a')]
    assert lost(page_of('class C:\n    b = a')) == [('0', 'a')]
    assert lost(page_of('from math import *\ntau, cosine')) == [('0', 'cosine')]
    assert lost(page_of('#| echo: false\na = 1', '#| code-fold: true\nb = 1', 'print(a, b)')) == [('2', 'a')]


@contextmanager
def as_it_was():
    "Put back what a hidden cell may change behind the names"
    import matplotlib, numpy as np, torch
    from fastai.vision.all import defaults
    path, where, env, own = list(sys.path), os.getcwd(), dict(os.environ), {k: list(v) if isinstance(v, list) else v for k, v in vars(defaults).items()}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with warnings.catch_warnings(), matplotlib.rc_context(): yield
    finally:
        for f, s in zip((random.setstate, np.random.set_state, torch.set_rng_state), states): f(s)
        sys.path[:] = path
        os.chdir(where)
        os.environ.clear(); os.environ.update(env)
        vars(defaults).update(own)


def run_cell(cell, names):
    "Run `cell` as a notebook does: what its last line gives is shown"
    tree, file = ast.parse(cell.source), f'{cell.page.stem} {cell.id}'
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    linecache.cache[file] = len(cell.source), None, cell.source.splitlines(True), file
    exec(compile(tree, file, 'exec'), names)
    res = last and eval(compile(ast.Expression(last.value), file, 'eval'), names)
    if res is not None: getattr(res, '_repr_html_', res.__repr__)()


def run_page(page):
    "Run what is shown in the names of `__main__`; hidden cells see these, and the shown ones nothing of theirs"
    main, hidden = types.ModuleType('__main__'), {}
    sys.modules['__main__'] = main
    for c in cells(page):
        if c.shown: run_cell(c, vars(main))
        else:
            both = {**vars(main), **hidden}
            with as_it_was(): run_cell(c, both)
            hidden |= {k: v for k, v in both.items() if k not in vars(main) or vars(main)[k] is not v}


@pytest.fixture
def reader(monkeypatch):
    "Somebody at a notebook"
    import matplotlib.pyplot as plt
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])
    with as_it_was():
        plt.switch_backend('agg')
        yield
        plt.close('all')


@pytest.mark.parametrize('page', for_users, ids=lambda p: p.stem)
def test_runs(page, reader, monkeypatch):
    monkeypatch.chdir(page.parent)
    run_page(page)


def test_hidden_cells_cannot_help(tmp_path, reader):
    "The check itself"
    def run(*sources):
        (tmp_path/'page.ipynb').write_text(json.dumps(dict(cells=[dict(cell_type='code', id=str(i), source=s) for i, s in enumerate(sources)])))
        run_page(tmp_path/'page.ipynb')
    with pytest.raises(NameError): run('#| hide\na = 1', 'a')
    with pytest.raises(AssertionError): run('import sys', '#| hide\nsys.path.insert(0, "here")', 'assert sys.path[0] == "here"')
    with pytest.raises(AssertionError): run('a = 1', '#| hide\na = 2', 'assert a == 2')
    with pytest.raises(AssertionError): run('a = 1', '#| hide\nb = 2', '#| hide\nassert a == b')
    run('a = 1', '#| hide\nb = a', 'a += 1', '#| hide\nassert (a, b) == (2, 1)')


@pytest.mark.parametrize('page', pages, ids=lambda p: p.stem)
def test_names_are_shown(page): assert lost(cells(page)) == []


@pytest.mark.parametrize('page', for_users, ids=lambda p: p.stem)
def test_nothing_private(page):
    private = [(c.id, a.name) for c in cells(page) if c.shown for n in imports(c.source) if n.module.startswith('fastai_normx') for a in n.names if a.name[0] == '_']
    assert private == []
