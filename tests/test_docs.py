"Every public name has a docstring, documented parameters and a lesson."
import inspect, json, re
from importlib import import_module
from pathlib import Path

import pytest
from fastcore.docments import docments

root = Path(__file__).resolve().parent.parent
modules = [import_module(f'fastai_normx.{p.stem}') for p in sorted((root/'fastai_normx').glob('[a-z]*.py')) if p.stem != 'all']
cells = [''.join(c['source']) for p in (root/'nbs').rglob('*.ipynb') for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
lessons = '\n'.join(c for c in cells if not re.search(r'^#\|\s*export', c, re.M))


def public():
    "`(name, object)`: what `__all__` holds, the public methods of its classes, and the patches"
    from fastai.data.core import DataLoaders
    from fastai.data.transforms import Normalize
    from fastai.learner import Learner
    from fastai.callback.core import Callback
    seen = {}
    for m in modules:
        for n in m.__all__:
            o = getattr(m, n)
            seen[n] = o
            if inspect.isclass(o): seen |= {f'{n}.{k}': v for k, v in inspect.getmembers(o, inspect.isroutine)
                                            if not k.startswith('_') and getattr(v, '__module__', '').startswith('fastai_normx') and not hasattr(Callback, k) and not k.startswith(('before_', 'after_'))}
    for c in (DataLoaders, Learner, Normalize): seen |= {f'{c.__name__}.{k}': v for k, v in inspect.getmembers(c, inspect.isroutine) if not k.startswith('_') and getattr(v, '__module__', '').startswith('fastai_normx')}
    return seen


inner = 'constants evidence harm inside judge pipeline report trained view warn'.split()  # how it knows: not part of the star import
names = public()
own = {k: o for k, o in names.items() if getattr(o, '__module__', '').rpartition('.')[2] not in inner or k.partition('.')[0] in ('Finding', 'MatchReport', 'NormxWarning', 'StatsMatchWarning', 'applied_stats')}
own = {k: o for k, o in own.items() if callable(o)}


def test_the_contract():
    contract = '''ChannelStats data_stats NormStats expected_stats Normalize.from_pretrained Normalize.from_data DataLoaders.normalize_for stats_match MatchReport Finding
        StatsMatch StatsMatchWarning infer_normalization DataLoaders.stats_match Learner.stats_match ActivationLogger normx_expected normx_check normx_demo'''.split()
    assert not set(contract) - set(names)


@pytest.mark.parametrize('name', names)
def test_has_a_docstring(name): assert (inspect.getdoc(names[name]) or '').strip()


@pytest.mark.parametrize('name', own)
def test_parameters_are_documented(name):
    o = names[name]
    if inspect.isclass(o) and issubclass(o, Warning): return
    f = o.__init__ if inspect.isclass(o) and '__init__' in vars(o) and not hasattr(o, '__dataclass_fields__') else o
    docs = docments(f, full=True)
    missing = [k for k, d in docs.items() if k not in ('return', 'self', 'cls', 'args', 'kwargs') and not (d.docment or '').strip()]
    assert not missing, missing


@pytest.mark.parametrize('name', own)
def test_is_used_in_a_lesson(name): assert re.search(rf'\b{name.split(".")[-1]}\b', lessons)


@pytest.mark.parametrize('p', sorted((root/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_pages_lose_nothing(p):
    "nbdev drops what stands below title and subtitle in their cell, and links names in backticks itself, also inside a link"
    md = [''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown']
    assert re.fullmatch(r'# .+\n\n> .+\n?', next(s for s in md if s.startswith('# ')))
    assert not [m for s in md for m in re.findall(r'\[`\w+`\]\([^)]*\)', s) if m.split('`')[1] in names]


@pytest.mark.parametrize('p', sorted((root/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_links_between_pages(p):
    md = [''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown']
    lost = [f for s in md for f in re.findall(r'\]\(([^)#:]+\.ipynb)', s) if not (p.parent/f).exists()]
    assert not lost
