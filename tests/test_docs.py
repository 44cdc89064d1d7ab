"Every public name has a docstring, documented parameters and a lesson."
import inspect, json, re
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
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


@pytest.mark.parametrize('p', sorted((root/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_saved_outputs_hold_no_progress_bar(p):
    outs = [''.join(o.get('text', [])) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] for o in c.get('outputs', [])]
    assert not [t for t in outs if re.search(r'[\r\x1b\u2588]', t)]


@pytest.fixture(scope='module')
def site():
    "What stands between nbdev and the site"
    pytest.importorskip('tomllib')
    spec = spec_from_file_location('pages', root/'.ci/pages.py')
    spec.loader.exec_module(m := module_from_spec(spec))
    return m


def test_a_documented_name_keeps_its_underscores_and_loses_its_module(site):
    md = '### ChannelStats.__add__\n\n```python\ndef __add__(\n    other:__main__.ChannelStats\n)->__main__.ChannelStats:\n```'
    got = site.tidy_doc(md)
    assert '### ChannelStats.\\_\\_add\\_\\_ {#channelstats.__add__}\n' in got
    assert 'def __add__(\n    other:ChannelStats\n)->ChannelStats:' in got


def test_only_documented_names_are_linked(site):
    known = {'stats': {'channelstats'}}
    text = '[`ChannelStats`](/stats.html#channelstats), [`_merge`](/stats.html#_merge), [`x`](https://docs.fast.ai/stats.html#x)'
    assert site.unlink(text, known) == '[`ChannelStats`](/stats.html#channelstats), `_merge`, [`x`](https://docs.fast.ai/stats.html#x)'


def test_a_printed_warning_looks_like_one(site):
    texts = 'StatsMatchWarning: The images', 'ok, no Warning: here'
    cell = dict(cell_type='code', source='', outputs=[dict(output_type='stream', name='stdout', text=[t]) for t in texts])
    site.tidy(cell)
    assert [o['name'] for o in cell['outputs']] == ['stderr', 'stdout']


def test_dead_links_are_found(site, tmp_path):
    (tmp_path/'in').mkdir()
    def write(name, id, *links): (tmp_path/name).write_text(f'<h2 id="{id}"></h2>' + ''.join(f'<a href="{o}"></a>' for o in links))
    write('index.html', 'here', 'in/a.html#there', '#here', '#gone', 'https://x.org/#y')
    write('in/a.html', 'there', '../index.html#here', '../index.html#gone', 'lost.html')
    assert sorted(site.dead_links(tmp_path)) == ['in/a.html: ../index.html#gone', 'in/a.html: lost.html', 'index.html: #gone']


def test_search_puts_internals_behind(site):
    entry = dict(href='judge.html#blue', title='Judge', section='Blue', text='a grey image')
    assert site.rank(dict(entry), {'judge.html'}) == entry | dict(section='Internals · Judge · Blue', text='a grey image gray')
    assert site.rank(dict(entry, section=''), {'judge.html'})['section'] == 'Internals · Judge'
    assert site.rank(dict(entry, text='an image'), set()) == entry | dict(text='an image')


def test_addresses_have_one_home(site):
    urls = site.urls()
    bar = site.yaml.safe_load((root/'nbs/_quarto.yml').read_text(encoding='utf-8'))['website']['navbar']
    assert [t['href'] for t in bar['tools'] if t['icon'] == 'github'] == [urls['Repository']]
    sources = [*(root/'fastai_normx').glob('*.py'), *(root/'nbs').rglob('*.ipynb'), *(root/'nbs').glob('*.yml')]
    assert not [p.name for p in sources if urls['Homepage'].rstrip('/') in p.read_text(encoding='utf-8')]
