"The evidence for the tutorial why_normalize: the script runs, and its saved results are whole."
import importlib.util, json, math, re, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
script, results = root/'benchmarks/normalization_matters.py', root/'benchmarks/results'


@pytest.fixture(scope='module')
def nm():
    sys.path.insert(0, str(script.parent))  # as when the script is run: it imports its neighbour
    spec = importlib.util.spec_from_file_location('normalization_matters', script)
    spec.loader.exec_module(mod := importlib.util.module_from_spec(spec))
    return mod


@pytest.fixture(scope='module')
def res(): return json.loads((results/'normalization_matters.json').read_text(encoding='utf-8'))


def test_quick(tmp_path):
    r = subprocess.run([sys.executable, script, '--quick', '--out', tmp_path/'out.json'], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert r.returncode == 0, r.stderr
    assert '| BGR' in r.stdout and not list(tmp_path.iterdir()), 'prints tables, saves nothing'


def test_without_images_it_says_what_to_pass(nm):
    with pytest.raises(SystemExit, match='need --data FOLDER: ImageNet images named by wnid'): nm.imagenet(None)


def test_a_folder_named_by_wnid_needs_no_labels(nm, tmp_path):
    from PIL import Image
    Image.new('RGB', (300, 260)).save(tmp_path/'n01440764.jpg')
    Image.new('L', (260, 300)).save(tmp_path/'n01443537_12.JPEG')
    x, y = nm.imagenet(tmp_path)
    assert x.shape == (2, 3, 224, 224) and y.tolist() == [0, 1]


def test_affine_mistakes(nm):
    "Constants composed by hand in float64; matched constants give the moments they promise"
    import numpy as np, torch
    x = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    f = x.double().numpy()/255
    ps = nm.pipelines(x)
    for k, want in {'normalized twice': ((f-.5)/.5-.5)/.5, '0-255': f*255, '/255 twice, then normalized': (f/255-.5)/.5, 'BGR': (f[:, ::-1]-.5)/.5}.items():
        np.testing.assert_allclose(ps[k](x).numpy(), want, atol=2e-4 if k == '0-255' else 1e-5)
    own = ps["the data's own"](x).double()
    assert own.mean().abs() < 1e-5 and abs(own.std(unbiased=False)-1) < 1e-5
    ref = (.4, .5, .6), (.1, .2, .3)
    z = nm.norm(x, *nm.matched(nm.own(x), ref)).double()
    np.testing.assert_allclose(z.mean((0, 2, 3)), (np.array(ref[0])-.5)/.5, atol=1e-5)
    np.testing.assert_allclose(z.std((0, 2, 3), unbiased=False), np.array(ref[1])/.5, atol=1e-5)


def test_results_are_whole(nm, res):
    assert set(res) == set(nm.SECTIONS)
    for k, s in res.items(): assert {'date', 'machine', 'method'} <= set(s) and s['machine']['threads'] == 1, k
    arms = {(r['regime'], r['constants'], r['seed']) for r in res['elpv']['runs']}
    seeds = res['elpv']['seeds']
    assert len(seeds) >= 3 and len(arms) == len(res['elpv']['runs']) == len(nm.REGIMES)*6*len(seeds)
    assert set(res['imagenet']['rows']) == set(res['mechanism']['by_depth'])
    assert [o['batch_size'] for o in res['imagenet']['batch_size_ladder']] == [1, 2, 4, 8, 16, 50, 250]
    assert len(res['layernorm']['runs']) == 2*len(res['layernorm']['seeds']) >= 6
    assert set(res['cameras']['rows']) == set(nm.CAMERAS)


def test_results_hold_numbers_and_no_paths(res):
    def walk(o):
        if isinstance(o, dict): [walk(v) for v in o.values()]
        elif isinstance(o, list): [walk(v) for v in o]
        elif isinstance(o, float): assert math.isfinite(o)
        elif isinstance(o, str): assert not re.search(r'(^|\s)/\w+/|://', o), o
    walk(res)


def test_tables_follow_from_the_runs(nm, res):
    import numpy as np
    assert nm.rounded(nm.elpv_table(res['elpv']['runs'])) == res['elpv']['table']
    v = [r['accuracy']["ImageNet's"]['frozen'] for r in res['layernorm']['runs'] if r['norm'] == 'layernorm2d']
    assert abs(np.mean(v)-res['layernorm']['table']["ImageNet's"]['LayerNorm'][0]) < 1e-3


def test_top1_by_pipeline_has_one_source(res):
    top1 = json.loads((results/'pipeline_top1.json').read_text(encoding='utf-8'))['top1']
    assert top1 == {k: dict(frozen=r['frozen'], batch=r['batch']) for k, r in res['imagenet']['rows'].items()}


def test_constants_are_still_what_the_libraries_say(nm, res):
    from fastai_normx.expected import expected_stats
    assert [list(o) for o in expected_stats(nm.ARCH)] == res['imagenet']['constants']['expected 0.5 / 0.5']
