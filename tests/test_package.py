"The package as it is installed and read: imports, wheel, notebooks, README."
import ast, importlib.util, json, os, re, subprocess, sys, textwrap, zipfile
from pathlib import Path

import pytest
from test_visible import for_users

root = Path(__file__).resolve().parent.parent
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts and p.parts[-2][0] != '_')
python = lambda code, **kw: subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, **kw)


@pytest.mark.parametrize('nb', [p for p in notebooks if p not in for_users], ids=lambda p: p.stem)  # those for users run in test_visible.py
def test_notebook(nb):
    code = f'''
        import sys
        from nbdev.test import test_nb
        sys.exit(not test_nb({str(nb)!r}, basepath={str(root)!r})[0])'''
    r = python(code)
    assert r.returncode == 0, r.stdout + r.stderr


@pytest.mark.parametrize('nb', notebooks, ids=lambda p: p.stem)
def test_saved_outputs(nb):
    for c in json.loads(nb.read_text(encoding='utf-8'))['cells']:
        out = json.dumps(c.get('outputs', []))
        assert '"output_type": "error"' not in out
        assert not re.search(r'/(home|root|tmp|work|Users)/', out), f'a path of one machine in {c["id"]}'
        assert not re.search(r'(Future|Deprecation)Warning: ', out), f"another library's warning in {c['id']}"


def test_readme_is_made_from_the_index():
    spec = importlib.util.spec_from_file_location('readme', root/'.ci/readme.py')
    spec.loader.exec_module(mod := importlib.util.module_from_spec(spec))
    assert (root/'README.md').read_text(encoding='utf-8') == mod.readme(), 'run: python .ci/readme.py'


def test_readme_links():
    for link in re.findall(r'\]\(([^)#]+)', (root/'README.md').read_text(encoding='utf-8')):
        if '://' not in link: assert (root/link).exists(), link


def test_importing_has_no_effect_beyond_the_patches():
    code = '''
        import sys, warnings; warnings.filterwarnings('ignore')
        import fastai.vision.all as fv
        def state(): return {(c.__name__, k) for c in vars(fv).values() if isinstance(c, type) and c.__module__.startswith('fas') for k in vars(c) if not k.startswith('_orig_')}
        before, filters, mods = state(), list(warnings.filters), set(sys.modules)
        from fastai_normx.all import *
        assert warnings.filters == filters
        print(sorted(state() - before))
        print(sorted(m for m in set(sys.modules) - mods if m.partition('.')[0] in ('timm', 'transformers', 'open_clip', 'skimage')))'''
    new, optional = map(ast.literal_eval, python(code, check=True).stdout.strip().splitlines())
    assert sorted(new) == [('DataLoaders', 'normalize_for'), ('DataLoaders', 'stats_match'), ('Learner', 'stats_match'), ('Normalize', '__call__'), ('Normalize', 'from_data'), ('Normalize', 'from_pretrained')]
    assert optional == []


def test_version_has_one_home():
    import fastai_normx
    from importlib.metadata import version
    assert fastai_normx.__version__ == version('fastai_normx')


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Wheel and sdist, the wheel made from the sdist as an installer would"
    dist = tmp_path_factory.mktemp('dist')
    r = subprocess.run([sys.executable, '-m', 'build', str(root), '-o', str(dist)], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]
    return dist


def test_wheel_holds_the_package_and_its_requirements(built):
    whl, = built.glob('*.whl')
    z = zipfile.ZipFile(whl)
    names = [n for n in z.namelist() if '.dist-info' not in n]
    assert {Path(n).parts[0] for n in names} == {'fastai_normx'}
    assert {'fastai_normx/expected.py', 'fastai_normx/normalize.py', 'fastai_normx/match.py', 'fastai_normx/activations.py', 'fastai_normx/cli.py', 'fastai_normx/all.py'} <= set(names)
    meta = z.read(next(n for n in z.namelist() if n.endswith('METADATA'))).decode()
    needs = {re.split(r'[^\w-]', r)[0] for r in re.findall('^Requires-Dist: (.*)$', meta, re.M) if 'extra ==' not in r}
    assert needs == {'fastai', 'torch', 'fastcore'}
    assert {'demo', 'docs', 'dev', 'timm', 'transformers'} == set(re.findall('^Provides-Extra: (.*)$', meta, re.M))
    assert 'License-Expression: Apache-2.0' in meta


def test_wheel_works_in_an_empty_directory(built, tmp_path):
    whl, = built.glob('*.whl')
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', str(tmp_path/'site'), str(whl)], check=True)
    (tmp_path/'empty').mkdir()
    code = '''
        import warnings; warnings.filterwarnings('ignore')
        from fastai_normx.all import *
        import fastai_normx
        print(fastai_normx.__file__)
        print(tuple(expected_stats('ResNet18_Weights.DEFAULT')))'''
    r = python(code, cwd=tmp_path/'empty', env={**os.environ, 'PYTHONPATH': str(tmp_path/'site')})
    where, stats = r.stdout.strip().splitlines()
    assert where.startswith(str(tmp_path)) and stats == '((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))'
