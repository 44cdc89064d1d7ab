"What each library says is the judge: every timm tag, every torchvision weights entry, real processors on real pixels."
import json, re, sys, warnings
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from timm.models import get_deprecated_models, get_pretrained_cfg, is_model_pretrained
from torch import nn
from torchvision import models as M, transforms as T
from torchvision.transforms import v2

import fastai_normx.expected as E
from fastai_normx.constants import families
from fastai_normx.expected import ExpectedStatsWarning, NormStats, expected_stats

imagenet = (.485, .456, .406), (.229, .224, .225)
quiet = pytest.mark.filterwarnings('ignore::fastai_normx.expected.ExpectedStatsWarning')


# Libraries' own values

@quiet
@pytest.mark.parametrize('prefix', ['', 'timm/', 'hf-hub:timm/', 'hf_hub:timm/'])
def test_every_timm_tag(prefix):
    names = timm.list_models(pretrained=True)
    assert len(names) > 1000
    for n in names[::1 if not prefix else 50]:
        cfg, s = get_pretrained_cfg(n), expected_stats(prefix+n)
        assert (s.mean, s.std) == (tuple(cfg.mean), tuple(cfg.std)), n
        assert s.source == f"timm {timm.__version__}: {n if '.' in n else f'{n}.{cfg.tag}' if cfg.tag else n}"


@quiet
def test_every_untagged_timm_name_takes_the_default_tag_or_refuses():
    refused = 0
    for arch in timm.list_models():
        if is_model_pretrained(arch):
            cfg, s = get_pretrained_cfg(arch), expected_stats(arch)
            assert tuple(s) == (tuple(cfg.mean), tuple(cfg.std)), arch
            if cfg.tag: assert s.source.endswith(cfg.tag)
        else:
            refused += 1
            with pytest.raises(ValueError, match='only defaults'): expected_stats(arch)
    assert refused > 50


@quiet
def test_every_deprecated_timm_name():
    deps = get_deprecated_models()
    assert len(deps) > 100
    for old, new in deps.items():
        if not is_model_pretrained(new):  # timm's own map has an entry without weights
            with pytest.raises(ValueError, match=f'{re.escape(new)}|no pretrained tag'): expected_stats(old)
            continue
        cfg, s = get_pretrained_cfg(new), expected_stats(old)
        assert tuple(s) == (tuple(cfg.mean), tuple(cfg.std)), old
        assert old in s.notes[0] and new in s.notes[0]


def test_a_removed_timm_name(monkeypatch):
    monkeypatch.setattr('timm.models.get_deprecated_models', lambda: {'gone': None})
    with pytest.raises(ValueError, match="removed the model 'gone' without a replacement"): expected_stats('gone')


def test_tags_that_disagree_are_noted():
    assert '1 of 2 tags' in expected_stats('efficientnet_b1').notes[0]
    assert expected_stats('resnet18').notes == ()


@quiet
def test_every_torchvision_weights_entry():
    resolved = inside = 0
    for name in M.list_models():
        for w in M.get_model_weights(name):
            t = w.transforms()
            if hasattr(t, 'mean'):
                want = tuple(t.mean), tuple(t.std)
                for source in (w, str(w), w.transforms, t):
                    s = expected_stats(source)
                    assert (s.mean, s.std) == want, w
                assert expected_stats(w).source == f"torchvision {version('torchvision')}: {w}"
                resolved += 1
            else:
                with pytest.raises(ValueError, match='state no mean and std'): expected_stats(w)
                inside += 1
    assert resolved > 140 and inside == 21


@quiet
def test_all_classification_builders():
    names = M.list_models(module=M)
    assert len(names) == 80
    for n in names:
        w = M.get_model_weights(n).DEFAULT
        t, f = w.transforms(), getattr(M, n)
        for source in (f, partial(f), partial(f, weights=w)):
            assert tuple(expected_stats(source)) == (tuple(t.mean), tuple(t.std)), n
    features = M.VGG16_Weights.IMAGENET1K_FEATURES
    for w in (features, 'IMAGENET1K_FEATURES', str(features)): assert expected_stats(partial(M.vgg16, weights=w)).std == tuple(features.transforms().std)
    for kw in (dict(weights=None), dict(pretrained=False)):
        with pytest.raises(ValueError, match='has random weights'): expected_stats(partial(M.resnet18, **kw))
    with pytest.raises(ValueError, match='has no entry .V9.'): expected_stats(partial(M.resnet18, weights='V9'))
    assert expected_stats(partial(timm.models.efficientnet_b1, pretrained_cfg='ft_in1k')) == expected_stats('efficientnet_b1.ft_in1k')


@quiet
def test_torchvision_names_that_timm_does_not_know():
    for n in M.list_models():
        if not timm.is_model(n) and hasattr(t := M.get_model_weights(n).DEFAULT.transforms(), 'mean'):
            assert tuple(expected_stats(n)) == (tuple(t.mean), tuple(t.std)), n


def test_weights_class_stands_for_its_default():
    assert expected_stats(M.ResNet50_Weights) == expected_stats('ResNet50_Weights') == expected_stats(M.ResNet50_Weights.DEFAULT)
    with pytest.raises(ValueError, match='has no entry .V9.. Its entries: IMAGENET1K_V1'): expected_stats('ResNet50_Weights.V9')


def test_same_weights_two_answers_is_reported_from_both_sides():
    disagree = []
    for n in M.list_models(module=M):
        if not is_model_pretrained(f'{n}.tv_in1k'): continue
        for source in (f'{n}.tv_in1k', M.get_model_weights(n).IMAGENET1K_V1):
            with warnings.catch_warnings(record=True) as ws:
                warnings.simplefilter('always')
                s = expected_stats(source)
            if ws: disagree.append(n); assert 'transform_input' in s.notes[-1] and ws[0].filename == __file__
    assert disagree == ['inception_v3']*2


@quiet
def test_fastai_architectures():
    from fastai.vision.learner import model_meta
    for f, meta in model_meta.items():
        assert tuple(expected_stats(f)) == tuple(map(tuple, meta['stats'])), f
    assert expected_stats('xresnet50').source.startswith('fastai ')


def test_functions_nobody_knows():
    def my_net(): pass
    with pytest.raises(ValueError, match='No library states the constants of .*my_net'): expected_stats(my_net)
    assert expected_stats(timm.models.resnet50) == expected_stats('resnet50')


# Transforms

pixels = torch.arange(3*16*16).reshape(3, 16, 16).remainder(256).to(torch.uint8)

@pytest.mark.parametrize('t', [
    T.Compose([T.ToPILImage(), T.ToTensor(), T.Normalize(*imagenet)]),
    v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*imagenet)]),
    v2.Compose([v2.ToDtype(torch.float32, scale=False), v2.Normalize([123., 117., 104.], [58., 57., 56.])]),
    nn.Sequential(v2.ToDtype(torch.float32, scale=True), v2.Normalize(*imagenet), v2.Normalize([.1, .2, .3], [2., 3., 4.])),
    T.Compose([v2.ToDtype(torch.float32, scale=True), T.Compose([T.RandomHorizontalFlip(0.), T.Normalize(*imagenet)])]),
])
def test_transforms_act_as_stated(t):
    s = expected_stats(t)
    ours = (pixels.double()/255 - torch.tensor(s.mean, dtype=float)[:, None, None])/torch.tensor(s.std, dtype=float)[:, None, None]
    assert torch.allclose(t(pixels).double(), ours, atol=1e-4)


def test_bare_and_missing_normalize():
    assert tuple(expected_stats(T.Normalize(*imagenet))) == tuple(expected_stats(v2.Normalize(*imagenet))) == imagenet
    with pytest.raises(ValueError, match='no Normalize'): expected_stats(T.Compose([T.ToTensor()]))
    with pytest.raises(ValueError, match='no Normalize'): expected_stats(v2.Resize(8))


def test_conversions_are_followed_in_order():
    for t in (T.Compose([T.ToTensor(), T.Normalize(*imagenet), v2.ToDtype(torch.float16)]),
              v2.Compose([T.ToTensor(), v2.ToDtype(torch.float32), v2.Normalize(*imagenet)]),
              v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.ToDtype(torch.uint8, scale=True), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*imagenet)])):
        assert tuple(expected_stats(t)) == imagenet
    t = v2.Compose([v2.ToDtype(torch.uint8, scale=True), v2.ToDtype(torch.float32), v2.Normalize([123.675]*3, [58.395]*3)])
    assert np.allclose(tuple(expected_stats(t)), ((.485,)*3, (.229,)*3))
    with pytest.raises(ValueError, match='RandomChoice normalizes at random'): expected_stats(T.RandomChoice([T.Normalize(*imagenet), T.Normalize([.5]*3, [.5]*3)]))


def test_timm_transform():
    t = timm.data.create_transform(224, mean=(.1, .2, .3), std=(.4, .3, .2))
    assert np.allclose(tuple(expected_stats(t)), ((.1, .2, .3), (.4, .3, .2)), atol=1e-7)


# Configs

@pytest.mark.parametrize('name,kw', [
    ('ViTImageProcessor', {}), ('ViTImageProcessor', dict(do_normalize=False)), ('ViTImageProcessor', dict(rescale_factor=1/127.5)),
    ('ViTImageProcessor', dict(do_rescale=False, image_mean=[120., 110., 100.], image_std=[60., 50., 40.])),
    ('ViTImageProcessor', dict(do_rescale=False, do_normalize=False)), ('ViTImageProcessor', dict(image_mean=.4, image_std=.3)),
    ('CLIPImageProcessor', dict(do_center_crop=False)), ('ConvNextImageProcessor', {}), ('BeitImageProcessor', dict(do_center_crop=False)),
    ('EfficientNetImageProcessor', dict(rescale_factor=1/127.5, rescale_offset=True, do_center_crop=False)),
    ('EfficientNetImageProcessor', dict(do_center_crop=False)), ('SiglipImageProcessor', {}),
])
@pytest.mark.parametrize('form', ['object', 'dict', 'file', 'folder', 'processor'])
def test_processors_act_as_stated(name, kw, form, tmp_path):
    transformers = pytest.importorskip('transformers')
    if not hasattr(transformers, name): pytest.skip(f'{name} is not in this transformers')
    p = getattr(transformers, name)(do_resize=False, **kw)
    p.save_pretrained(tmp_path)
    f, = tmp_path.glob('p*processor_config.json')
    source = dict(object=p, dict=p.to_dict(), file=f, folder=str(tmp_path), processor=type('P', (), dict(image_processor=p))())[form]
    s = expected_stats(source)
    img = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    want = np.asarray(p(img, return_tensors='np')['pixel_values'][0], dtype=float)
    mean, std = (np.array(o)[:, None, None] for o in s)
    assert np.allclose(want, (img.transpose(2, 0, 1)/255 - mean)/std, rtol=1e-4, atol=1e-4)


def test_a_config_may_lean_on_its_class(monkeypatch):
    pytest.importorskip('transformers')
    assert expected_stats(dict(image_processor_type='CLIPImageProcessor')).mean == families['CLIP'].mean
    old = dict(feature_extractor_type='ViTFeatureExtractor', do_normalize=True, image_mean=[.1, .2, .3], image_std=[.4, .4, .4])
    assert np.allclose(tuple(expected_stats(old)), ((.1, .2, .3), (.4, .4, .4)))
    with pytest.raises(ValueError, match='does not accept this config|does not have'): expected_stats(dict(image_processor_type='TimmWrapperImageProcessor'))
    with pytest.raises(ValueError, match='defaults of MyOwnProcessor, which transformers'): expected_stats(dict(image_processor_type='MyOwnProcessor'))
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ImportError, match=re.escape("pip install 'fastai_normx[transformers]'")): expected_stats(dict(image_processor_type='CLIPImageProcessor'))


def test_rescale_left_open_is_noted():
    s = expected_stats(dict(image_mean=[.5]*3, image_std=[.5]*3))
    assert tuple(s) == ((.5,)*3, (.5,)*3) and '1/255' in s.notes[0]


def test_rescale_off_with_small_mean_warns_and_is_not_repaired():
    with pytest.warns(ExpectedStatsWarning, match='`do_rescale` off'):
        s = expected_stats(dict(do_rescale=False, rescale_factor=1/255, do_normalize=True, image_mean=[.5]*3, image_std=[.5]*3))
    assert np.allclose(s.std, .5/255)


@pytest.mark.parametrize('f', ['1/255', None, 0, -1])
def test_bad_rescale_factor(f):
    with pytest.raises(ValueError, match='rescale_factor .* expected a number greater than 0'): expected_stats(dict(do_normalize=True, do_rescale=True, rescale_factor=f, image_mean=[.5], image_std=[.5]))


def test_0_255_constants_in_a_config_warn():
    with pytest.warns(ExpectedStatsWarning, match='divide by 255'): expected_stats(dict(image_mean=[123.7]*3, image_std=[58.]*3))


def test_bgr_processors_are_reported():
    with pytest.warns(ExpectedStatsWarning, match='turns RGB into BGR'):
        expected_stats(dict(image_processor_type='MobileViTImageProcessor', do_rescale=True, rescale_factor=1/255, do_normalize=False, do_flip_channel_order=True))


def test_every_processor_of_transformers():
    "Black and white images through each processor with its defaults tell the constants it really applies"
    transformers, Image = pytest.importorskip('transformers'), pytest.importorskip('PIL.Image')
    transformers.logging.set_verbosity_error()
    agree = 0
    for n in (n for n in dir(transformers) if n.endswith('ImageProcessor')):
        try:
            p = getattr(transformers, n)()
            black, white = (p(Image.new('RGB', (256, 256), c), return_tensors='np')['pixel_values'] for c in ('black', 'white'))
            axis, = (i for i, k in enumerate(np.shape(black)) if k == 3)
            assert np.ndim(black) > 3
        except Exception: continue  # needs arguments or other libraries, or makes patches
        black, white = (np.moveaxis(np.asarray(o, dtype=float), axis, 0).reshape(3, -1) for o in (black, white))
        seen = (white - black).max(1) > 0
        at = (white - black)[0].argmax()
        std = 1/(white - black)[:, at]
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            s = expected_stats(p)
        if any('BGR' in str(w.message) or 'reverse' in str(w.message) for w in ws): continue
        assert seen.all() and np.allclose(s.std, std, atol=1e-4) and np.allclose(s.mean, -black[:, at]*std, atol=1e-4), n
        agree += 1
    assert agree > 20


def test_constants_in_reverse_order_are_reported():
    with pytest.warns(ExpectedStatsWarning, match="ImageNet's mean in reverse order"):
        expected_stats(dict(do_normalize=True, do_rescale=True, rescale_factor=1/255, image_mean=[.406, .456, .485], image_std=[.225, .224, .229]))


def test_timm_configs(tmp_path):
    cfg = get_pretrained_cfg('vit_base_patch16_clip_224.openai')
    assert tuple(expected_stats(cfg)) == (cfg.mean, cfg.std)
    with pytest.raises(ValueError, match='only defaults'): expected_stats(get_pretrained_cfg('botnet50ts_256'))
    wrapper = dict(image_processor_type='TimmWrapperImageProcessor', architecture='resnet18', data_config=dict(mean=[.1]*3, std=[.2]*3))
    assert expected_stats(wrapper).mean == (.1,)*3
    hub = dict(architecture='vit_base_patch16_clip_224', num_classes=512, pretrained_cfg=cfg.to_dict())
    (tmp_path/'config.json').write_text(json.dumps(hub))
    s = expected_stats(tmp_path)
    assert tuple(s) == (cfg.mean, cfg.std) and s.source == f'{tmp_path.name}/config.json: vit_base_patch16_clip_224.openai'
    assert expected_stats(f'local-dir:{tmp_path}') == s
    assert expected_stats(timm.data.resolve_data_config({}, pretrained_cfg=cfg.to_dict())).mean == cfg.mean


def test_open_clip(tmp_path):
    open_clip = pytest.importorskip('open_clip')
    from open_clip.transform import PreprocessCfg
    cfg = PreprocessCfg(mean=(.1, .2, .3), std=(.4, .3, .2))
    assert tuple(expected_stats(cfg)) == (cfg.mean, cfg.std)
    (tmp_path/'open_clip_config.json').write_text(json.dumps(dict(model_cfg={}, preprocess_cfg=dict(mean=cfg.mean, std=cfg.std))))
    assert expected_stats(tmp_path).std == cfg.std
    model = open_clip.create_model('RN50')
    assert expected_stats(model).mean == tuple(model.visual.preprocess_cfg['mean'])


def test_configs_in_one_folder_that_disagree(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(mean=[.5]*3, std=[.5]*3)))
    (tmp_path/'open_clip_config.json').write_text(json.dumps(dict(preprocess_cfg=dict(mean=[.4]*3, std=[.3]*3))))
    with pytest.warns(ExpectedStatsWarning, match='Used open_clip_config.json'): assert expected_stats(tmp_path).mean == (.4,)*3


@pytest.mark.parametrize('text,msg', [
    ('', 'is empty'), ('{"mean": [', 'not valid JSON'), ('[1, 2]', 'expected an object .* received a list'), ('3', 'received a int'), ('null', 'received a NoneType'),
    ('{"hidden_size": 8}', 'states no normalization.*hidden_size'), ('{}', 'its keys: none'), ('{"mean": [0.5], "std": null}', 'states no normalization'),
    ('{"mean": [0.5, 0.5], "std": [0.5]}', 'same length'), ('{"mean": [0.5], "std": [-1]}', 'greater than 0'), ('{"mean": [0.5], "std": [NaN]}', 'finite'),
    ('{"mean": ["a"], "std": [1]}', 'one number per channel'), ('{"mean": {"a": 1}, "std": [1]}', 'one number per channel'),
    ('{"do_normalize": true, "do_rescale": true, "rescale_factor": 0.004, "image_mean": null}', 'states no `image_mean`'), ('['*100000, 'nested too deeply|not valid JSON'),
])
def test_bad_json(tmp_path, text, msg):
    f = tmp_path/'x.json'
    f.write_text(text)
    with pytest.raises(ValueError, match=msg): expected_stats(f)


def test_bad_files(tmp_path):
    f = tmp_path/'x.json'
    f.write_bytes(b'\xff\xfe\x00{')
    with pytest.raises(ValueError, match='not a text file'): expected_stats(str(f))
    with open(f, 'wb') as o: o.truncate(E._max_bytes + 1)
    with pytest.raises(ValueError, match='16 MiB; a config has a few kB'): expected_stats(f)
    with pytest.raises(FileNotFoundError, match='no file or folder'): expected_stats(tmp_path/'nothing')
    with pytest.raises(FileNotFoundError, match='no file or folder'): expected_stats('./nothing')
    (tmp_path/'d').mkdir()
    with pytest.raises(ValueError, match='No config in the folder .* Looked for preprocessor_config.json'): expected_stats(tmp_path/'d')
    (tmp_path/'d'/'config.json').write_text('{"hidden_size": 8}')
    with pytest.raises(ValueError, match='hidden_size'): expected_stats(tmp_path/'d')


# Names nobody knows

def test_unknown_names():
    with pytest.raises(ValueError) as e: expected_stats('resnet5O')
    for part in ("'resnet5O'", 'Tried: timm', 'torchvision', 'Closest names: resnet50', '(mean, std)'): assert part in str(e.value)
    with pytest.raises(ValueError, match='No known name is close'): expected_stats('qqqqqqqqqq')
    with pytest.raises(ValueError, match='does not know'): expected_stats('')
    with pytest.raises(ValueError, match=r'no pretrained tag .a1_in1kk.. Its tags: resnet50.a1_in1k,'): expected_stats('resnet50.a1_in1kk')
    with pytest.raises(ValueError, match='does not know'): expected_stats('a'*5000)
    with pytest.raises(FileNotFoundError, match='no file or folder'): expected_stats('~nobody-of-that-name/x')
    with pytest.raises(ValueError, match="only defaults.* pass 'EfficientNet_B7_Weights.IMAGENET1K_V1'"): expected_stats('efficientnet_b7')
    with pytest.raises(ValueError, match='Closest names: ResNet50_Weights'): expected_stats('ResNet50_Weight.DEFAULT')


def test_a_hub_name_without_network(monkeypatch):
    pytest.importorskip('huggingface_hub')
    def unreachable(hub): raise ConnectionError
    monkeypatch.setattr(E, '_hub_reachable', unreachable)
    for name in ('nobody/no-such-model-anywhere', 'hf-hub:nobody/no-such-model-anywhere', 'timm/no_such_model.tag'):
        with pytest.raises(ValueError, match='not in the local cache; check the name and the network'): expected_stats(name)


def test_a_hub_name_from_the_cache(monkeypatch, tmp_path):
    hub = pytest.importorskip('huggingface_hub')
    NormStats(*imagenet).save(tmp_path)
    def download(repo, f):
        if not (tmp_path/f).exists(): raise hub.errors.EntryNotFoundError(f, response=None) if 'response' in hub.errors.EntryNotFoundError.__init__.__code__.co_varnames else hub.errors.EntryNotFoundError(f)
        return str(tmp_path/f)
    monkeypatch.setattr(hub, 'try_to_load_from_cache', lambda repo, f: str(tmp_path/f))
    monkeypatch.setattr(hub, 'hf_hub_download', download)
    assert tuple(expected_stats('somebody/some-model')) == imagenet


def test_without_timm(monkeypatch):
    for m in [m for m in sys.modules if m.partition('.')[0] == 'timm']: monkeypatch.delitem(sys.modules, m)
    monkeypatch.setitem(sys.modules, 'timm', None)
    monkeypatch.setattr(E, 'version', lambda n: version(n) if n != 'timm' else (_ for _ in ()).throw(E.PackageNotFoundError(n)))
    assert expected_stats('resnet50').source.startswith('torchvision')
    with pytest.raises(ValueError, match=re.escape("pip install 'fastai_normx[timm]'")): expected_stats('vit_base_patch16_224.augreg_in21k')


# Models

@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: nn.Sequential(m, nn.Flatten()), nn.DataParallel, torch.compile])
def test_timm_models(wrap):
    s = expected_stats(wrap(timm.create_model('vit_tiny_patch16_224.augreg_in21k_ft_in1k')))
    assert tuple(s) == ((.5,)*3, (.5,)*3) and s.source.endswith('vit_tiny_patch16_224.augreg_in21k_ft_in1k')


def test_models_that_cannot_say():
    with pytest.raises(ValueError, match='only defaults'): expected_stats(timm.create_model('botnet50ts_256'))
    with pytest.raises(ValueError, match='does not record which weights'): expected_stats(M.resnet18())
    with pytest.raises(ValueError, match='expect different constants'): expected_stats(nn.ModuleList([timm.create_model('resnet18'), timm.create_model('vit_tiny_patch16_224')]))
    assert tuple(expected_stats(M.detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None))) == ((0.,)*3, (1.,)*3)
    assert tuple(expected_stats(nn.Sequential(T.Normalize(*imagenet), timm.create_model('resnet18')))) == ((0.,)*3, (1.,)*3)
    assert tuple(expected_stats(nn.Sequential(T.Normalize(*imagenet), nn.Conv2d(3, 8, 3)))) == ((0.,)*3, (1.,)*3)
    m = nn.Linear(1, 1)
    m.config = type('C', (), dict(name_or_path='google/vit'))()
    with pytest.raises(ValueError, match=re.escape("AutoImageProcessor.from_pretrained('google/vit')")): expected_stats(m)


def test_channels_come_from_the_model():
    assert expected_stats(timm.create_model('resnet18', in_chans=1)).n_in == 1
    assert expected_stats(timm.create_model('tresnet_m')).n_in == 3  # its first convolution has 48
    with pytest.raises(ValueError, match='must come from you'): expected_stats(timm.create_model('resnet18', in_chans=4))
    assert expected_stats(timm.create_model('resnet18', in_chans=4), extra=(.3, .2)).mean[3] == .3
    assert expected_stats(nn.ModuleList([nn.Conv2d(1, 8, 1), timm.create_model('resnet18')])).n_in == 3


def test_channels_and_extra():
    assert expected_stats('resnet50', n_in=np.int64(1)).n_in == 1
    for n in (1, 3):
        with pytest.raises(ValueError, match='`extra` is for channels beyond the 3'): expected_stats('resnet50', n_in=n, extra=(.3, .2))


@pytest.mark.parametrize('bad', [3, None, object(), b'resnet50', {1, 2}, np.eye(3), nn.ReLU, (1, 2, 3), ()])
def test_types_nobody_reads(bad):
    with pytest.raises(ValueError, match='expected_stats cannot read|A pair `.mean, std.` was expected'): expected_stats(bad)


# NormStats and pairs

floats = st.floats(.01, .5)

@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=6))
def test_pairs_in_every_container(ms):
    mean, std = map(tuple, zip(*ms))
    for f in (list, tuple, np.array, lambda o: torch.tensor(o, dtype=torch.float64), lambda o: torch.tensor(o, dtype=torch.float64).view(1, -1, 1, 1)):
        assert tuple(expected_stats((f(mean), f(std)))) == (mean, std)


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=6), st.text(), st.lists(st.text(), max_size=2))
def test_json_round_trip(tmp_path_factory, ms, source, notes):
    mean, std = zip(*ms)
    s = NormStats(mean, std, source, ref_mean=mean, ref_std=std, notes=notes)
    assert expected_stats(s.save(tmp_path_factory.mktemp('s'))) == s


def test_odd_pairs_warn_and_are_kept():
    for pair in (((.5,)*3, (.6,)*3), ((123., 117., 104.), (58., 57., 56.)), ((-.1,)*3, (.2,)*3)):
        with pytest.warns(ExpectedStatsWarning, match='Used as given') as ws: s = expected_stats(pair)
        assert tuple(s) == pair and ws[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert expected_stats('mobilenetv5_300m.gemma3n' if timm.is_model('mobilenetv5_300m') else 'resnet50')  # a library's own 0/1 is no cause to warn
        for same in (((0.,)*3, (1.,)*3), (0, 1), dict(mean=[0, 0, 0], std=[1, 1, 1]), dict(mean=0., std=1.), T.Normalize([0.]*3, [1.]*3), ([0], [1])):
            s = expected_stats(same)
            assert set(s.mean) == {0.} and set(s.std) == {1.}


@pytest.mark.parametrize('mean,std,msg', [
    ((.5,)*3, (.5,)*2, 'same length.*received 3 and 2'), ((.5,), (0,), 'greater than 0'), ((.5,), (-.1,), 'greater than 0'), ((.5,), (float('nan'),), 'finite'),
    ((float('inf'),), (1,), 'finite'), ((), (), 'empty'), ('mean', (1,), 'one number per channel'), (None, (1,), 'one number per channel'), ((.5, 'x'), (1, 1), 'one number per channel'),
])
def test_bad_constants(mean, std, msg):
    with pytest.raises(ValueError, match=msg): expected_stats((mean, std))


def test_normstats_refuses_odd_references():
    with pytest.raises(ValueError, match='`mean` and `ref_std` need the same length'): NormStats((.5,), (.5,), ref_std=(.1, .2))


def test_save_keeps_what_is_there(tmp_path):
    s = expected_stats('resnet50')
    f = s.save(tmp_path/'new'/'folder')
    assert f.name == 'preprocessor_config.json' and s.save(f) == f
    f.write_text('{"precious": 1}')
    with pytest.raises(FileExistsError, match='overwrite=True'): s.save(f)
    assert f.read_text() == '{"precious": 1}'
    f.write_bytes(b'\xff\xfe')
    with pytest.raises(FileExistsError): s.save(f)
    assert expected_stats(s.save(f, overwrite=True)) == s


def test_a_saved_config_that_was_changed_later(tmp_path):
    transformers = pytest.importorskip('transformers')
    expected_stats('resnet50').save(tmp_path)
    p = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    p.image_mean = [.1, .2, .3]
    p.save_pretrained(tmp_path/'new')
    for source in (p, tmp_path/'new'): assert expected_stats(source).mean == (.1, .2, .3)
    (tmp_path/'bom.json').write_text('{"mean": [0.5], "std": [0.25]}', encoding='utf-8-sig')
    assert expected_stats(tmp_path/'bom.json').std == (.25,)


def test_references_keep_constants_and_pixels_apart():
    s = expected_stats('resnet50')
    assert s.ref_std == (.272, .264, .276) and s.std == (.229, .224, .225)
    clip = expected_stats('vit_base_patch16_clip_224.openai')
    assert (clip.ref_mean, clip.ref_std) == (clip.mean, clip.std)
    assert expected_stats(M.video.R3D_18_Weights.DEFAULT).ref_std is None


def test_register_your_own():
    class Entry:
        def __init__(self, norm): self.norm = norm
    expected_stats.register(Entry, lambda source: source.norm)
    assert expected_stats(Entry('resnet50')) == expected_stats('resnet50')
    assert expected_stats(Entry((.5, .25))).n_in == 1


# Channel order, ranges, and one number for every channel

def test_every_processor_that_flips_channels_says_so():
    "A red and a blue image through each processor tell whether it swaps them"
    transformers, Image = pytest.importorskip('transformers'), pytest.importorskip('PIL.Image')
    transformers.logging.set_verbosity_error()
    flipping, straight = [], 0
    for n in (n for n in dir(transformers) if re.search('ImageProcessor(Fast|Pil)?$', n)):
        cls = getattr(transformers, n)
        try:
            p = cls(apply_ocr=False) if 'LayoutLM' in n else cls()
            black, red = (np.asarray(p(Image.new('RGB', (256, 256), c), return_tensors='np')['pixel_values'], dtype=float) for c in ('black', 'red'))
            axis, = (i for i, k in enumerate(red.shape) if k == 3)
        except Exception: continue  # needs arguments or other libraries, or makes patches
        flips = abs(np.moveaxis(red-black, axis, 0).reshape(3, -1)).max(1).argmax() == 2
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            s = expected_stats(p)
            bare = p.to_dict()
            bare.pop('do_flip_channel_order', None)
            from_dict = expected_stats(bare)
        said = any('BGR' in o for o in s.notes) and any('Perhaps this model expects BGR' in str(w.message) for w in ws)
        assert said == flips and any('BGR' in o for o in from_dict.notes) == flips, n
        if flips: flipping.append(n)
        else: straight += 1
    assert {'MobileViTImageProcessor'} <= set(flipping) and straight > 20
    for n in ('UVDocImageProcessor', 'LayoutLMv2ImageProcessor'):
        if hasattr(transformers, n): assert n in flipping


bgr = (.406, .456, .485), (.225, .224, .229)

@pytest.mark.parametrize('source', [
    T.Compose([T.ToTensor(), T.Normalize(*bgr)]), [T.ToTensor(), v2.Normalize(*bgr)], bgr, dict(mean=bgr[0], std=bgr[1]), ((103.939/255, 116.779/255, 123.68/255), (1/255,)*3),
    (families['CLIP'].mean[::-1], families['CLIP'].std[::-1]), dict(mean=[104/255, 117/255, 124/255], std=[1/255]*3),
])
def test_constants_in_reverse_order_are_reported_on_every_path(source):
    with pytest.warns(ExpectedStatsWarning, match="(ImageNet|CLIP|DPN)'s mean in reverse order.*expects BGR, so reverse the channels before Normalize"): s = expected_stats(source)
    assert 'expects BGR' in s.notes[-1]


def test_the_right_order_is_not_reported():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for c in [*families.values(), ((.41, .46, .49), (.2,)*3), ((.5,)*3, (.5,)*3), ((.45,), (.2,))]: expected_stats(tuple(c))


img = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)

@pytest.mark.parametrize('d', [
    dict(input_space='RGB', input_range=[0, 1], mean=[.485, .456, .406], std=[.229, .224, .225]), dict(input_space='RGB', input_range=[0, 255], mean=[124, 117, 104], std=[1, 1, 1]),
    dict(input_space='BGR', input_range=[0, 255], mean=[104, 117, 124], std=[1, 1, 1]), dict(input_space='BGR', input_range=(0, 1), mean=[.4, .5, .6], std=[.1, .2, .3]),
    dict(input_space=None, input_range=[0., 1.], mean=[.5]*3, std=[.5]*3), dict(input_range=[0, 255], mean=.5*255, std=.5*255),
])
@pytest.mark.parametrize('form', [dict, 'partial', 'json', 'model'])
def test_segmentation_models_pytorch(d, form, tmp_path):
    smp = pytest.importorskip('segmentation_models_pytorch')
    f = partial(smp.encoders.preprocess_input, **d)
    (tmp_path/'c.json').write_text(json.dumps(d))
    m = nn.Conv2d(3, 8, 1)
    m.__dict__.update(d)  # as pretrainedmodels and the encoders made from it do
    if form == 'model' and not isinstance(d['mean'], list): pytest.skip('pretrainedmodels gives lists')
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        s = expected_stats({dict: d, 'partial': f, 'json': tmp_path/'c.json', 'model': m}[form])
    bgr = d.get('input_space') == 'BGR'
    assert bool([w for w in ws if "input_space='BGR'" in str(w.message)]) == bgr == any('reverse the channels before Normalize' in n for n in s.notes)
    s = s.spread(3)
    x = img[..., ::-1] if bgr else img
    assert np.allclose(f(img.astype(float)), (x/255 - np.array(s.mean))/np.array(s.std))


@pytest.mark.parametrize('d,msg', [
    (dict(input_range=[-1, 1], mean=[.5], std=[.5]), r'input_range \[-1, 1\]: expected \[0, 1\] or \[0, 255\]'), (dict(input_range='full', mean=[.5], std=[.5]), "input_range 'full'"),
    (dict(input_range=[], mean=[.5], std=[.5]), r'input_range \[\]'), (dict(input_space='HSV', mean=[.5], std=[.5]), "input_space 'HSV': expected 'RGB' or 'BGR'"),
    (dict(input_space=3, mean=[.5], std=[.5]), 'input_space 3'), (dict(input_space=[1], mean=[.5], std=[.5]), r'input_space \[1\]'),
])
def test_odd_ranges_and_spaces_are_refused(d, msg):
    with pytest.raises(ValueError, match=msg): expected_stats(d)


def test_a_preprocessing_function_without_a_range():
    smp = pytest.importorskip('segmentation_models_pytorch')
    f = partial(smp.encoders.preprocess_input, mean=[120., 110., 100.], std=[60., 50., 40.])
    s = expected_stats(f)
    assert np.allclose(f(img.astype(float)), (img/255 - np.array(s.mean))/np.array(s.std))
    with pytest.raises(ValueError): expected_stats(partial(smp.encoders.preprocess_input, mean=None, std=None))


def test_one_number_for_every_channel(tmp_path):
    for source in (T.Normalize((.5,), (.25,)), T.Compose([T.ToTensor(), T.Normalize([.5], [.25])]), dict(mean=.5, std=.25), (.5, .25), v2.Normalize([.5], [.25])):
        s = expected_stats(source)
        assert s.uniform and s.n_in == 1 and tuple(expected_stats(source, n_in=3)) == ((.5,)*3, (.25,)*3) and tuple(expected_stats(source, n_in=5)) == ((.5,)*5, (.25,)*5)
        assert not expected_stats(source, n_in=3).uniform and NormStats(**s.to_dict()) == s
        assert expected_stats(s.save(tmp_path/'u', overwrite=True)) == s and expected_stats(s) == s
    for source in (((.5,), (.25,)), T.Normalize([.5]*3, [.25]*3), T.Normalize([.5], [.25]*3), dict(mean=[.5], std=[.25]), 'resnet50', T.Compose([T.ToTensor(), T.Normalize([0.], [1.]), T.Normalize(*imagenet)])):
        assert not expected_stats(source).uniform
    with pytest.raises(ValueError, match='no rule to choose by|must come from you'): expected_stats(((.5,), (.25,)), n_in=3)
    with pytest.raises(ValueError, match='states one number for every channel, 0.5, so leave `extra` out'): expected_stats((.5, .25), n_in=4, extra=(.3, .2))
    with pytest.raises(ValueError, match='one number for every channel'): NormStats(*imagenet, uniform=True)
    s = NormStats(.5, .25, ref_mean=.4, ref_std=.2, uniform=True).spread(3)
    assert s.ref_mean == (.4,)*3 and s.ref_std == (.2,)*3 and NormStats(*imagenet).spread(7).n_in == 3


class Instances(M.WeightsEnum):
    "As torchgeo's weights: `transforms` is an instance"
    A = M._api.Weights('https://example.org/a.pth', T.Compose([T.ToTensor(), T.Normalize(*imagenet)]), {})
    B = M._api.Weights('https://example.org/b.pth', nn.Sequential(v2.Resize(8), v2.Normalize([0.], [1.])), {})
    C = M._api.Weights('https://example.org/c.pth', lambda: T.Normalize([.5]*3, [.25]*3), {})
    D = M._api.Weights('https://example.org/d.pth', T.Compose([T.ToTensor(), T.Lambda(abs), T.Normalize(*imagenet)]), {})


def test_weights_whose_transforms_are_an_instance():
    assert tuple(expected_stats(Instances.A)) == imagenet and expected_stats(Instances.B, n_in=13).std == (1.,)*13 and expected_stats(Instances.C).std == (.25,)*3
    assert str(Instances.A) in expected_stats(Instances.A).source
    with pytest.raises(ValueError, match='Lambda does to pixels is not known'): expected_stats(Instances.D)


def test_transforms_of_detection_and_flow_entries():
    for w in (M.detection.FasterRCNN_ResNet50_FPN_Weights.DEFAULT, M.optical_flow.Raft_Large_Weights.DEFAULT):
        want = 'detection models normalize inside' if 'RCNN' in str(w) else r'pixels in \[-1,1\], so pass \(\(.5,.5,.5\)'
        for source in (w, w.transforms, w.transforms(), partial(w.transforms)):
            with pytest.raises(ValueError, match=f'state no mean and std: .*{want}'): expected_stats(source)
    with pytest.raises(ValueError, match='cannot be made without arguments'): expected_stats(T.Normalize)
    with pytest.raises(ValueError, match='cannot be made without arguments'): expected_stats(partial(T.Normalize, mean=[.5]))
    assert expected_stats(partial(T.Normalize, *imagenet)).mean == imagenet[0]


@quiet
def test_every_pretrained_open_clip_model():
    open_clip = pytest.importorskip('open_clip')
    for model, tag in open_clip.list_pretrained():
        cfg = open_clip.get_pretrained_cfg(model, tag)
        for source in ((model, tag), [model, tag], f'{model}/{tag}'):
            s = expected_stats(source)
            assert (s.mean, s.std) == (tuple(cfg['mean']), tuple(cfg['std'])) and s.source.endswith(f': {model}/{tag}'), source
    assert tuple(expected_stats('ViT-B-32/laion2b-s34b-b79k')) == tuple(expected_stats(('ViT-B-32', 'laion2b_s34b_b79k')))  # open_clip takes either
    for source in (('RN50', 'opnai'), 'RN50/opnai'):
        with pytest.raises(ValueError, match="RN50 has no pretrained tag 'opnai'. Its tags: openai"): expected_stats(source)
    with pytest.raises(ValueError, match="no pretrained model 'ViT-B32'. Closest names: .*ViT-B-32"): expected_stats(('ViT-B32', 'openai'))


def test_open_clip_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'open_clip', None)
    with pytest.raises(ValueError, match='pip install open_clip_torch'): expected_stats(('RN50', 'openai'))
    assert E._open_clip_name('RN50/openai') is None


def test_the_outer_config_of_an_open_clip_model_counts():
    open_clip = pytest.importorskip('open_clip')
    model = open_clip.create_model('MobileCLIP-S1')  # a trunk of timm's
    assert hasattr(model.visual, 'trunk') and expected_stats(model.visual.trunk).source.startswith('timm')
    model.visual.preprocess_cfg.update(mean=(.1, .2, .3), std=(.4, .3, .2))
    for m in (model, model.visual, nn.Sequential(model.visual)): assert tuple(expected_stats(m)) == ((.1, .2, .3), (.4, .3, .2))


def _xray(**kw):
    "A class as torchxrayvision's, whose `utils.normalize` is `(2*x/255 - 1)*1024` (version 1.5.7)"
    cls = type('DenseNet', (nn.Module,), dict(__module__='torchxrayvision.models'))
    m = cls()
    m.features = nn.Sequential(nn.Conv2d(1, 8, 3))
    m.__dict__.update(kw)
    return m


def test_torchxrayvision():
    x = np.arange(256.)
    for m in (_xray(weights='densenet121-res224-all'), nn.Sequential(_xray(weights='densenet121-res224-all'), nn.Flatten())):
        s = expected_stats(m)
        assert s.n_in == 1 and 'torchxrayvision' in s.source and np.allclose((x/255-s.mean[0])/s.std[0], (2*x/255-1)*1024)
    with pytest.raises(ValueError, match='random weights'): expected_stats(_xray(weights=None))
    xrv = pytest.importorskip('torchxrayvision')
    assert np.allclose(xrv.utils.normalize(x[None].astype(np.uint8), 255)[0], (2*x/255-1)*1024, atol=1e-3)
    with pytest.raises(ValueError, match='random weights'): expected_stats(xrv.models.DenseNet())


json_like = st.recursive(st.none() | st.booleans() | st.text(max_size=3) | st.floats() | st.integers() | st.just(10**400), lambda o: st.lists(o, max_size=3) | st.dictionaries(st.text(max_size=2), o, max_size=2), max_leaves=4)
keys = st.sampled_from(['mean', 'std', 'image_mean', 'image_std', 'do_normalize', 'do_rescale', 'rescale_factor', 'rescale_offset', 'offset', 'include_top', 'do_flip_channel_order', 'input_space', 'input_range',
                        'architecture', 'tag', 'fastai_normx', 'preprocess_cfg', 'pretrained_cfg', 'image_processor', 'data_config', 'image_processor_type', 'feature_extractor_type', 3, None])
some_keys = st.dictionaries(keys, json_like, max_size=7) | st.fixed_dictionaries(dict(mean=json_like, std=json_like), optional=dict(tag=json_like, input_range=json_like, architecture=json_like))

@quiet
@settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
@given(some_keys | st.tuples(json_like, json_like) | st.lists(json_like, max_size=4))
def test_odd_sources_are_a_value_error_or_constants(source):
    try: s = expected_stats(source)
    except (ValueError, FileNotFoundError) as e: assert str(e)
    else: assert all(isinstance(v, float) for v in s.mean+s.std)
