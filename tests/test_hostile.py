"""What a config reader, the command and the reader of image files make of input that is broken, odd or meant to do harm.

The mutations of configs are drawn at random: 500 of them here. For 10,000, and for the long draws of `test_properties.py`:
`pytest --runslow -m slow`, or `RUNSLOW=1 pytest`."""
import copy, dataclasses, io, itertools, json, math, os, random, re, socket, struct, subprocess, sys, tempfile, threading, warnings, zlib
from collections import Counter
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from fastai.vision.core import PILImage
from PIL import Image

from fastai_normx import cli, stats
from fastai_normx.expected import ExpectedStatsWarning, NormStats, expected_stats
from fastai_normx.files import deep_behind
from fastai_normx.stats import data_stats
from fastai_normx.warn import NormxWarning

transformers, timm, open_clip = map(pytest.importorskip, ('transformers', 'timm', 'open_clip'))
from open_clip.transform import PreprocessCfg

# Real configs, as their libraries write them

processors = '''BeitImageProcessor BitImageProcessor CLIPImageProcessor ConvNextImageProcessor DeiTImageProcessor EfficientNetImageProcessor
    PerceiverImageProcessor LevitImageProcessor MobileNetV2ImageProcessor MobileViTImageProcessor SiglipImageProcessor
    ViTImageProcessor'''.split()
timm_names = 'resnet50.a1_in1k', 'vit_base_patch16_clip_224.openai', 'tf_efficientnet_lite0.in1k', 'dpn92.mx_in1k'


def plain(d): return json.loads(json.dumps(d))  # what a file can hold


def real_configs():
    "`{(library, name): config}`; the names of the config files tell the libraries apart"
    res = {('preprocessor_config.json', n): plain(getattr(transformers, n)().to_dict()) for n in processors}
    cfgs = {n: plain(timm.get_pretrained_cfg(n).to_dict()) for n in timm_names}
    for n, c in cfgs.items(): res['config.json', n] = dict(architecture=c['architecture'], num_classes=c['num_classes'], pretrained_cfg=c)
    clip = plain(dataclasses.asdict(PreprocessCfg()))
    res['open_clip_config.json', 'RN50'] = dict(model_cfg=dict(embed_dim=512, vision_cfg=dict(layers=12)), preprocess_cfg=clip)
    ours = NormStats((.1, .2, .3), (.4, .3, .2), 'a test', notes=('a note',))
    res['preprocessor_config.json', 'ours'] = dict(image_processor_type='ViTImageProcessor', do_resize=False, do_rescale=True,
        rescale_factor=1/255, do_normalize=True,
        image_mean=ours.mean, image_std=ours.std, mean=ours.mean, std=ours.std, fastai_normx=plain(ours.to_dict()))
    return {k: plain(d) for k, d in res.items()}


def part(d):
    "The part of a config that states the constants"
    return next((d[k] for k in ('pretrained_cfg', 'preprocess_cfg') if isinstance(d.get(k), dict)), d)


def stated(d):
    "Mean and std for pixels in [0,1], by the formulas of the libraries"
    d = part(d)
    if 'image_mean' not in d and 'mean' in d: return tuple(d['mean']), tuple(d['std'])
    f = d['rescale_factor'] if d.get('do_rescale') else 1
    mean, std = (d['image_mean'], d['image_std']) if d.get('do_normalize') else ([0.]*3, [1.]*3)
    mean, std = ([v]*3 if isinstance(v, float) else v for v in (mean, std))
    if d.get('include_top'): mean, std = mean, [s*s for s in std]
    off = 1 if d.get('rescale_offset') and f != 1 else 0
    return tuple((m+off)/(255*f) for m in mean), tuple(s/(255*f) for s in std)


# Mutations: each knows what has to come of it

huge = 10**400
def nest(v, n):
    for _ in range(n): v = [v]
    return v


no_number = ['0.5', '', 'ImageNet', None, True, False, {}, {'a': 1}, [[]], math.nan, math.inf, -math.inf, huge, -huge, 10**5000]
no_flag = ['false', 'no', '', [], [False], {}, {'a': 1}, 2, -1, .5, math.nan, huge]
no_name = [3, 0, .5, True, False, [], ['ViTImageProcessor'], {}, {'a': 1}, math.nan, huge]
junk = no_number+no_flag+no_name+['x'*10000, nest(1, 50), list(range(1000)), '../../etc/passwd', '__class__', '\0', '\ud800']


def bad_constants(rng, is_std):
    "A mean or std that no reader may accept"
    good = [.5, .4, .3]
    bad = no_number+[0, 0., -.5, -1e-30]*is_std
    one = rng.choice(bad)
    spoiled = [*good[:2], one]
    rng.shuffle(spoiled)
    return rng.choice([one if one is not huge else 'a', spoiled, [], [good, good], good[:2], good*2, [good[:1], good[:2]], '0.5 0.5 0.5',
        dict(enumerate(good)), nest(.5, 3000)])


wrong = {k: lambda rng, k=k: bad_constants(rng, 'std' in k) for k in ('mean', 'std', 'image_mean', 'image_std')}
wrong |= {k: lambda rng: rng.choice(no_flag) for k in ('do_normalize', 'do_rescale', 'rescale_offset', 'include_top',
    'do_flip_channel_order')}
wrong['rescale_factor'] = lambda rng: rng.choice(no_number+[0, -1/255, [1/255], '1/255', 1e-400, 1e400])
wrong['image_processor_type'] = lambda rng: rng.choice(no_name)
right = dict(mean=lambda rng: [rng.uniform(.01, .99) for _ in range(3)], std=lambda rng: [rng.uniform(.01, .5) for _ in range(3)],
    rescale_factor=lambda rng: rng.choice([1/255, 1/127.5]),
             do_rescale=lambda rng: rng.random() < .9, do_normalize=lambda rng: rng.random() < .9)
right |= {f'image_{k}': right[k] for k in ('mean', 'std')}
needed = 'mean std image_mean image_std do_normalize do_rescale rescale_factor image_processor_type pretrained_cfg preprocess_cfg'.split()


def spoil(rng, d):
    "Put a wrong value where it matters: refused"
    d = part(d)
    idle = [f'image_{k}' for k in ('mean', 'std') if not d.get('do_normalize')]+['rescale_factor']*(not d.get('do_rescale'))
    k = rng.choice([k for k in wrong if k in d and k not in idle and (k not in ('mean', 'std') or 'image_mean' not in d)])
    d[k] = wrong[k](rng)
    return 'refused'


def change(rng, d):
    "Other constants of the right kind: these are the answer"
    d = part(d)
    k = rng.choice([k for k in right if k in d])
    d[k] = right[k](rng)
    if 'image_mean' in d: d |= {k: d[f'image_{k}'] for k in ('mean', 'std') if k in d}
    return 'constants'


def disturb(rng, d):
    "Anything at a place that says nothing about constants: no difference"
    for _ in range(rng.randint(1, 3)):
        at = rng.choice([d, part(d)])
        used = {*wrong, *needed, 'input_range', 'input_space', 'feature_extractor_type', 'offset', 'image_processor', 'data_config',
            'fastai_normx'}
        k = rng.choice([*(k for k in at if k not in used), 'new', 'architecture', 'tag', '__class__', 'auto_map', ''])
        at[k] = copy.deepcopy(rng.choice(junk))
    return 'constants'


def of_a_later_version(rng, d):
    "Data of ours that this version cannot know: the constants beside them count"
    d = part(d)
    own = d['fastai_normx'] if isinstance(d.get('fastai_normx'), dict) else {}
    k = rng.choice(['mean', 'std', 'source', 'ref_mean', 'ref_std', 'notes', 'uniform', 'version', ''])
    d['fastai_normx'] = rng.choice([own | {k: copy.deepcopy(rng.choice(junk))}, rng.choice(junk)]) if own else rng.choice(junk)
    return 'constants'


def leave_out(rng, d):
    "A key is missing: the defaults of the class that it names, which these configs hold, or refused"
    at = rng.choice([d, part(d)])
    k = rng.choice(list(at))
    del at[k]
    if k == 'image_processor_type' and 'do_normalize' not in d: return 'anything'  # MobileViT's does not normalize
    return 'constants or refused' if k in needed else 'constants'


def replace_whole(rng, d):
    "No config at all"
    d.clear()
    d |= rng.choice([{}, {'mean': None}, {'std': [1]}, {'a': {'b': 'c'}}, {'image_processor': {'image_processor': {}}},
        {'preprocess_cfg': nest([], 10)}, {'image_mean': [.5]*3}, {'do_normalize': True}])
    return 'refused'


def wrap(rng, d):
    "A config far inside others"
    inner, n = copy.deepcopy(d), rng.choice([1, 3, 900, 5000])
    for _ in range(n): inner = {rng.choice(['image_processor', 'pretrained_cfg', 'data_config']): inner}
    d.clear()
    d |= inner
    return 'constants or refused'


mutations = [spoil]*6+[change]*3+[disturb]*3+[of_a_later_version, leave_out, replace_whole, wrap]


def mutated(rng, d):
    "`d` after one to three mutations, what has to come of it, and the config before it was wrapped"
    d, todo = copy.deepcopy(d), []
    for _ in range(rng.choice([1, 1, 2, 3])):
        m = rng.choice(mutations)
        if m is of_a_later_version and 'image_mean' not in d: m = disturb
        before = d if m is not wrap else copy.deepcopy(d)
        todo.append(m(rng, d))
        if m in (replace_whole, wrap, leave_out, spoil): break
    return d, max(todo, key=['constants', 'constants or refused', 'refused', 'anything'].index), before


def garble(rng, text):
    "Bytes that are no longer the JSON text, or still are; `None`: a reader may take either view"
    b = text.encode('utf-8', 'surrogatepass')
    how = rng.choice(['cut', 'utf-16', 'bom', 'nul', 'flip', 'twice', 'spaces', 'pickle', 'comment', 'latin', 'cr'])
    if how == 'cut': return b[:rng.randrange(len(b.rstrip()))], 'refused'
    if how == 'utf-16': return text.encode('utf-16', 'surrogatepass'), 'constants or refused'
    if how == 'bom': return b'\xef\xbb\xbf'+b, None
    if how == 'nul': return b[:20]+b'\0'+b[20:], 'refused'
    if how == 'flip':
        i = rng.randrange(len(b))
        return b[:i]+bytes([b[i] ^ 1 << rng.randrange(8)])+b[i+1:], 'anything'
    if how == 'twice': return b+b, 'refused'
    if how == 'spaces': return b' \n\t'+b+b'\n'*1000, None
    if how == 'pickle': return b'cos\nsystem\n(S"touch executed"\ntR.', 'refused'
    if how == 'comment': return b'// a comment\n'+b, 'refused'
    if how == 'latin': return b[:1]+b'"\xe9": 1,'+b[1:], 'refused'
    return b.replace(b'\n', b'\r\n'), None


def as_object(kind, name, d):
    "The library's own object with the values of `d`; None where there is none"
    if name == 'ours' or not {'mean', 'image_mean'} & (p := part(d)).keys(): return None
    if kind == 'open_clip_config.json': cls = PreprocessCfg
    elif kind == 'config.json': cls = timm.models.PretrainedCfg
    else:
        if p is not d or p.get('image_processor_type') != name: return None
        cls = getattr(transformers, name)
    o = cls()
    for k, v in p.items():
        if k.isidentifier() and not k.startswith('__'): object.__setattr__(o, k, v)
    return o


def long_json(d):
    "`json.dumps` without Python's limits on digits and depth"
    digits, depth = sys.get_int_max_str_digits(), sys.getrecursionlimit()
    sys.set_int_max_str_digits(0)
    sys.setrecursionlimit(20000)
    try: return json.dumps(d)
    finally:
        sys.set_int_max_str_digits(digits)
        sys.setrecursionlimit(depth)


def sources(seed, configs, folder):
    "One mutated config in some form for `expected_stats`, what has to come of it, and a dict with its constants"
    rng = random.Random(seed)
    (kind, name), real = rng.choice(list(configs.items()))
    d, verdict, before = mutated(rng, real)
    want = part(real) | part(before)  # the defaults of the class that a config names are those of `real`
    form = rng.choice(['dict', 'file', 'file', 'name', 'folder', 'local-dir', 'object', 'bytes'])
    if form == 'object' and (o := as_object(kind, name, d)) is not None: return o, verdict, want
    if form in ('dict', 'object'): return d, verdict, want
    try: text = long_json(d)
    except RecursionError: return d, verdict, want
    data = text.encode('utf-8', 'surrogatepass')
    if form == 'bytes':
        data, new = garble(rng, text)
        verdict = verdict if new is None or verdict == 'refused' and new == 'constants or refused' else new
    (folder/kind).write_bytes(data)
    return {'folder': folder, 'local-dir': f'local-dir:{folder}', 'name': str(folder/kind)}.get(form, folder/kind), verdict, want


def close(s, want): return s.n_in == len(want[0]) and np.allclose(tuple(s), want, rtol=1e-9, atol=0)


def fault(seed, configs, folder):
    "What is wrong with the answer to mutation `seed`; None: nothing"
    folder.mkdir(exist_ok=True)
    for f in folder.iterdir(): f.unlink()
    source, verdict, want = sources(seed, configs, folder)
    try: s = expected_stats(source)
    except (ValueError, FileNotFoundError) as e:
        text = str(e)
        if verdict == 'constants': return f'refused: {text[:200]}'
        if not 20 < len(text) < 2000: return f'a message of {len(text)} characters: {text[:50]!r}'
        return None
    except BaseException as e: return type(e).__name__
    if verdict == 'refused': return f'accepted: {s!r}'[:300]
    if not all(map(math.isfinite, s.mean+s.std)) or min(s.std) <= 0: return f'odd: {s!r}'
    if verdict != 'anything' and not close(s, stated(want)): return f'wrong: {s!r} instead of {stated(want)}'
    return None


def faults(seeds, folder):
    transformers.logging.set_verbosity_error()
    configs, res = real_configs(), {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for seed in seeds:
            if (f := fault(seed, configs, folder)): res[seed] = f
    return res


def test_mutated_configs(tmp_path): assert faults(range(500), tmp_path/'model') == {}


@pytest.mark.slow
def test_many_mutated_configs(tmp_path): assert faults(range(500, 10000), tmp_path/'model') == {}


# Single faults of configs, each with the answer that a reader deserves

vit = dict(image_processor_type='ViTImageProcessor', do_rescale=True, rescale_factor=1/255, do_normalize=True, image_mean=[.5]*3,
    image_std=[.5]*3)
top = dict(vit, image_processor_type='EfficientNetImageProcessor', include_top=True, rescale_offset=False)


@pytest.mark.parametrize('d,msg', [
    (dict(vit, do_rescale='false'), "do_rescale 'false': expected true or false"), (dict(vit, do_normalize=[]),
    r'do_normalize \[\]: expected true or false'),
    (dict(vit, do_rescale=2), 'do_rescale 2: expected'), (dict(vit, do_flip_channel_order='no'), "do_flip_channel_order 'no': expected"),
    (dict(top, include_top='no'), "include_top 'no': expected"),
    (dict(top, image_std=[.5, .4]), 'same length.*received 3 and 2'), (dict(top, image_std=[.5, .4, -.3]), 'greater than 0'),
    (dict(vit, image_processor_type=3), 'class of its processor as 3: expected a name'),
    (dict(vit, image_processor_type=['ViT']), 'expected a name'), (dict(vit, feature_extractor_type='a b', image_processor_type=None),
    "as 'a b': expected a name"),
    (dict(vit, image_mean=[True, False, True]), 'one number per channel.*True'), (dict(vit, rescale_factor=True),
    'rescale_factor True: expected a number'), (dict(vit, rescale_factor=huge), 'expected a number greater than 0'),
    (dict(vit, rescale_factor=math.inf), 'rescale_factor inf'), (dict(vit, rescale_factor=1e-300), 'float32 cannot hold'),
    (dict(mean=[.5]*3, std=[1e-39, .5, .5]), 'float32 cannot hold'), (dict(mean=[1e39], std=[.5]), 'float32 cannot hold'),
    (dict(mean=nest(.5, 5000), std=.5), 'one number per channel'), (dict(mean=[.5]*20000, std=[.5]*20000), 'one number per channel'),
    (dict(mean=[.5]*3, std=bytearray(b'abc')), 'one number per channel'),
    (dict(mean=itertools.repeat(.5), std=.5), 'one number per channel'), (dict(pretrained_cfg=3),
    'states no normalization.*its keys: pretrained_cfg'), ({i: i for i in range(9999)}, 'its keys: 0, 1, 2'),
    (dict(image_processor_type='BertModel'), 'does not have'), (dict(image_processor_type='os'), 'does not have'),
    (dict(image_processor_type='__builtins__'), 'does not have'), (dict(image_processor_type='pipeline'), 'does not have'),
])
def test_wrong_values_are_named(d, msg):
    with pytest.raises(ValueError, match=msg) as e: expected_stats(d)
    assert len(str(e.value)) < 1000


def test_flags_mean_what_the_processor_makes_of_them(tmp_path):
    img = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    size = dict(do_resize=False, do_center_crop=False)
    for d in (top, dict(top, include_top=False), dict(top, do_normalize=False), dict(top, rescale_offset=True, rescale_factor=1/127.5),
        {k: v for k, v in top.items() if k != 'include_top'},
              dict(vit, include_top=True), dict(vit, rescale_offset=True), dict(vit, do_normalize=0), dict(vit, do_rescale=None),
              dict(top, include_top=None)):
        p = getattr(transformers, d['image_processor_type']).from_dict(d | size)
        want = np.asarray(p(img, return_tensors='np')['pixel_values'][0], dtype=float)
        mean, std = (np.array(o)[:, None, None] for o in expected_stats(d))
        assert np.allclose(want, (img.transpose(2, 0, 1)/255-mean)/std, rtol=1e-4, atol=1e-4), d


@pytest.mark.parametrize('source', [((.5,)*3, (127.5,)*3), dict(mean=[.5]*3, std=[127.5]*3), dict(vit, image_std=[127.5]*3),
    dict(vit, image_std=[58., 57., 57.], image_mean=[124., 116., 104.])])
def test_0_255_constants_warn_wherever_they_stand(source):
    with pytest.warns(ExpectedStatsWarning,
        match='look like constants for pixels in 0-255: for .0,1. divide by 255'): expected_stats(source)


@pytest.mark.parametrize('own', [dict(notes=3), dict(source=['a']), dict(uniform='yes'), dict(ref_mean='a'), dict(mean='later'),
    dict(std=[[1]]), 'text', [], dict(mean={}, version='9'), dict(notes=[1])], ids=str)
def test_data_of_ours_from_a_later_version(own, tmp_path):
    f = NormStats((.1, .2, .3), (.4, .3, .2), 'us').save(tmp_path)
    d = json.loads(f.read_text())
    d['fastai_normx'] = d['fastai_normx'] | own if isinstance(own, dict) else own
    f.write_text(json.dumps(d))
    s = expected_stats(f)
    assert tuple(s) == ((.1, .2, .3), (.4, .3, .2)) and 'us' not in s.source
    d['fastai_normx'] = NormStats((.1, .2, .3), (.4, .3, .2), 'us').to_dict() | dict(new_in_9=[1])
    f.write_text(json.dumps(d))
    assert expected_stats(f).source == 'us'
    f.write_text(json.dumps(dict(d, rescale_factor=1/127.5)))  # changed later, so it counts
    assert np.allclose(expected_stats(f).std, (.2, .15, .1))


@pytest.mark.parametrize('kw', [dict(source=3), dict(notes='text'), dict(notes=[3]), dict(uniform=1), dict(source=None)])
def test_normstats_says_which_of_its_words_are_wrong(kw):
    with pytest.raises(ValueError, match='`source` is a text, `notes` a tuple of texts'): NormStats(.5, .5, **kw)


def test_names_from_a_config_are_short_and_printable():
    for tag in (5, [1], {}, 'x'*999, 'a\x1b[2Jb', '\ud800', True):
        d = dict(architecture='resnet50', tag=tag, url='x', mean=[.5]*3, std=[.5]*3)
        cfg = timm.models.PretrainedCfg(**d)
        for source in (d, cfg, dict(pretrained_cfg=d)):
            s = expected_stats(source)
            assert s.source.endswith(': resnet50') and s.ref_mean is None
        object.__setattr__(cfg, 'architecture', tag)
        assert expected_stats(cfg).source.isprintable()


@pytest.mark.parametrize('cfg', [3, 'text', [1], dict(mean=3), dict(url='x', mean='a', std=[1]),
    dict(url='x', mean=[.5]*3, std=[.5]*3, input_size='big', tag=3),
    dict(url='x', mean=[.5]*3, std=[.5]*3, input_size=[3, 10**6, 10**6]), dict(url='x', mean=[.5]*3, std=[.5]*3, architecture=[])], ids=str)
def test_models_with_odd_configs(cfg):
    for name in ('pretrained_cfg', 'preprocess_cfg'):
        m = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
        setattr(m, name, cfg)
        try: s = expected_stats(m)
        except ValueError as e: assert 'Sequential' in str(e)
        else: assert tuple(s) == ((.5,)*3, (.5,)*3)


class NoText:
    def __repr__(self): raise RuntimeError


class Mirror:
    "Every attribute is another of its kind"
    def __getattr__(self, k):
        if k.startswith('__'): raise AttributeError(k)
        return Mirror()


def inside_itself():
    a, d = [], {}
    a.append(a)
    d['image_processor'] = d
    return [a, (a, a), d, dict(mean=a, std=a)]


@pytest.mark.parametrize('source', [NoText(), Mirror(), MagicMock(), *inside_itself(), [NoText(), NoText()], 'a\0b', '\0', 'a.json\0',
    './\0', '~\0/a', './'+'a'*5000, 'a'*10**6, '\ud800', '\ud800.json', Path('a'*300)],
    ids=lambda o: type(o).__name__)
def test_odd_objects_and_names(source):
    with pytest.raises((ValueError, FileNotFoundError)) as e: expected_stats(source)
    assert 20 < len(str(e.value)) < 2000


# Files

def within(seconds, f):
    "What `f` returns or raises; a failure if it takes too long"
    done = []
    def call():
        try: done.append(f())
        except BaseException as e: done.append(e)
    t = threading.Thread(target=call, daemon=True)
    t.start()
    t.join(seconds)
    assert done, f'still waiting after {seconds} s'
    return done[0]


def test_config_files_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path/'config.json')
    (tmp_path/'zero.json').symlink_to('/dev/zero')
    for f in (tmp_path/'config.json', tmp_path/'zero.json'): assert 'is not a regular file' in str(within(20, lambda: expected_stats(f)))
    assert 'states a normalization' in str(within(20, lambda: expected_stats(tmp_path)))
    (tmp_path/'a.json').symlink_to(tmp_path/'b.json')
    (tmp_path/'b.json').symlink_to(tmp_path/'a.json')
    with pytest.raises((ValueError, FileNotFoundError), match='a.json'): expected_stats(tmp_path/'a.json')
    (tmp_path/'d.json').mkdir()
    with pytest.raises(ValueError, match='No config in the folder'): expected_stats(tmp_path/'d.json')


@pytest.fixture
def unreadable():
    "A folder, and a function that calls another one as somebody who may read what others may"
    with tempfile.TemporaryDirectory() as t:
        os.chmod(t, 0o755)
        def as_nobody(f):
            root = os.geteuid() == 0
            if root: os.seteuid(65534)
            try: return f()
            finally:
                if root: os.seteuid(0)
        yield Path(t), as_nobody
        for p in Path(t).rglob('*'): os.chmod(p, 0o700)


def test_config_without_permission(unreadable):
    path, as_nobody = unreadable
    for f in ('a.json', 'config.json'): (path/f).write_text(json.dumps(vit))
    expected_stats(path/'a.json')
    os.chmod(path/'a.json', 0)
    os.chmod(path/'config.json', 0)
    with pytest.raises(ValueError, match="a.json' cannot be read: Permission denied"): as_nobody(lambda: expected_stats(path/'a.json'))
    says = 'No config in the folder .*\n- .*config.json. cannot be read: Permission denied'
    with pytest.raises(ValueError, match=says): as_nobody(lambda: expected_stats(path))
    (path/'m').mkdir(mode=0)
    with pytest.raises(ValueError, match='cannot be read: Permission denied'): as_nobody(lambda: expected_stats(path/'m'/'config.json'))


# Nothing is executed

dangerous = 'pickle.find_class subprocess.Popen os.system os.exec os.posix_spawn os.fork socket.connect os.remove os.rename'.split()
heard = None


def listen(event, args):
    if heard is None: return
    of_the_model = event == 'exec' and 'hostile_model' in str(getattr(args[0], 'co_filename', ''))
    if event in dangerous or of_the_model: heard.append((event, str(args)[:200]))


@pytest.fixture
def actions():
    "Whatever was started, unpickled, deleted or asked of a network meanwhile"
    global heard
    if not getattr(sys, '_normx_listens', False): sys.addaudithook(listen)
    sys._normx_listens, heard = True, []
    yield heard
    heard = None


def test_nothing_in_a_model_folder_is_executed_or_unpickled(tmp_path, actions):
    path = tmp_path/'hostile_model'
    path.mkdir()
    marker = f'import pathlib; pathlib.Path({str(tmp_path/"executed")!r}).touch()'
    pickled = b'cbuiltins\nexec\n(S"'+marker.encode()+b'"\ntR.'
    for f in 'image_processing_vit configuration __init__ transformers timm json'.split(): (path/f'{f}.py').write_text(marker)
    for f in ('pytorch_model.bin', 'model.pkl', 'config.pkl', 'preprocessor_config.pkl'): (path/f).write_bytes(pickled)
    maps = {k: 'image_processing_vit.ViTImageProcessor' for k in ('AutoImageProcessor', 'AutoConfig', 'AutoModel')}
    configs = [dict(vit, auto_map=maps), dict(image_processor_type='ViTImageProcessor', auto_map=maps, trust_remote_code=True),
        dict(image_processor_type='image_processing_vit', auto_map=maps),
               dict(vit, image_mean='__import__("os").system("touch executed")'), {**vit, '__class__': 'os.system',
               '__reduce__': ['os.system', ['true']]}, dict(py_object='os.system', **vit)]
    for d in configs:
        for f in ('preprocessor_config.json', 'config.json'):
            (path/f).write_text(json.dumps(d))
            for source in (path, path/f, d):
                try: assert tuple(expected_stats(source)) == ((.5,)*3, (.5,)*3)
                except ValueError: pass
            (path/f).unlink()
    del actions[-len(configs)*2:]  # our own `unlink`
    assert actions == [] and not (tmp_path/'executed').exists() and not Path('executed').exists()


def test_nothing_is_executed_by_mutations(tmp_path, actions):
    assert faults(range(10000, 10200), tmp_path/'model') == {}
    assert {e for e, _ in actions} <= {'os.remove'}  # our own `unlink`


# The command

def normx(capsys, *args):
    "Exit code and what was said, of the command run in this process"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, 'argv', ['normx', *map(str, args)])
        try: code = cli.main()
        except SystemExit as e: code = e.code
    said = ''.join(capsys.readouterr())
    if isinstance(code, str): code, said = 1, said+code
    assert 'Traceback' not in said
    return code or 0, said


@pytest.fixture
def photos(tmp_path):
    "A folder of four images"
    (tmp_path/'photos').mkdir()
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    for i, x in enumerate(images): Image.fromarray(x).save(tmp_path/'photos'/f'{i}.png')
    return tmp_path/'photos'


@pytest.mark.parametrize('text,msg', [('', 'is empty'), ('{', 'not valid JSON'), ('{"mean": [0.5], "std": [[0.5], "a"]}',
    'one number per channel'), (f'{{"mean": {huge}, "std": 1}}', 'has inf'),
    ('{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5]}', 'same length'), ('{"url": "x", "tag": 3, "mean": 0.5}', 'states no normalization'),
    ('['*99999, 'not valid JSON|nested too deeply'), ('{"preprocess_cfg": '*99+'1'+'}'*99, 'at most 8')])
def test_check_cannot_read_what_is_no_config(photos, capsys, text, msg):
    (photos.parent/'bad.json').write_text(text)
    code, said = normx(capsys, 'check', photos, photos.parent/'bad.json')
    assert code == 2 and re.search(msg, said) and said.startswith('normx check: ')


@pytest.mark.parametrize('args,code,msg', [
    (['', 'resnet50'], 2, 'name of the folder is empty'), (['\t', 'resnet50'], 2, 'name of the folder is empty'),
    (['PHOTOS', ''], 2, "does not know ''"), (['nowhere', 'resnet50'], 2, "'nowhere' does not exist"),
    (['\0', 'resnet50'], 2, 'does not exist'), (['a'*5000, 'resnet50'], 2, 'does not exist'), (['PHOTOS', '\0'], 2, 'does not know'),
    (['/dev/zero', 'resnet50'], 2, 'not a regular file'), (['PHOTOS', '/dev/zero'], 2, 'not a regular file'),
    (['PHOTOS', 'resnet50', '--n-items', '0'], 2, '`n_items` is a number of images above 0'),
    (['PHOTOS', 'resnet50', '--n-items', '-1'], 2, 'received -1'), (['PHOTOS', 'resnet50', '--n-items', 'many'], 2, 'invalid int'),
    (['PHOTOS', 'resnet50', '--n-in', '0'], 2, '`n_in` is a number of channels'), (['PHOTOS', 'resnet50', '--n-in', '4'], 2,
    'must come from you'), (['PHOTOS'], 2, 'required: name'), (['PHOTOS', 'resnet50', 'more'], 2, 'unrecognized'),
    (['PHOTOS/0.png', 'resnet50'], 0, 'ok'), (['PHOTOS', 'PHOTOS'], 2, 'No config in the folder'),
])
def test_odd_arguments_of_check(photos, capsys, args, code, msg):
    got, said = normx(capsys, 'check', *[a.replace('PHOTOS', str(photos)) for a in args])
    assert (got, msg in said) == (code, True), (got, said)


def test_one_file_of_one_colour_could_be_anything(tmp_path, capsys):
    Image.new('RGB', (32, 32), (90, 20, 30)).save(tmp_path/'one.png')
    for source in (tmp_path, tmp_path/'one.png'):
        code, said = normx(capsys, 'check', source, 'resnet50')
        assert code == 2 and said.startswith('cannot tell (1 image')
        assert 'mismatch' not in said and 'of one colour, which could be anything' in said


@pytest.mark.parametrize('args,code,msg', [(['expected', ''], 1, "does not know ''"), (['expected', '\0'], 1, 'does not know'),
    (['expected', 'resnet50', '--n-in', '-1'], 1, '`n_in` is a number'), (['expected', '--', '--json'], 1, 'does not know'),
    ([''], 1, "no command ''"), (['\0'], 1, 'no command'), (['--json'], 1, 'no command'), (['demo', 'FILE'], 2, 'File exists'),
    (['demo', 'FILE/below'], 2, 'Not a directory'), (['demo', ''], 2, 'name of the folder is empty'),
    (['demo', 'DIR', '--epochs', '-1'], 2, '`epochs` is 0 or more; received -1'), (['demo', 'DIR', '--epochs', 'x'], 2, 'invalid int')])
def test_odd_arguments_of_the_others(tmp_path, capsys, args, code, msg):
    (tmp_path/'file').touch()
    got, said = normx(capsys, *[a.replace('FILE', str(tmp_path/'file')).replace('DIR', str(tmp_path/'new')) for a in args])
    assert (got, msg in said) == (code, True), (got, said)
    assert not (tmp_path/'new').exists()


def test_what_a_terminal_would_obey_is_escaped(tmp_path, capsys):
    d = tmp_path/'a\x1b[31mb'
    NormStats(.5, .5, 'us\x1b[2J', notes=('\x1b]0;x\x07',)).save(d)
    (d/'\udcff\x1b.png').write_bytes(b'no image')
    Image.new('RGB', (8, 8)).save(d/'a.png')
    for args in (['expected', d], ['expected', d, d/'no.json'], ['check', d, d]):
        said = normx(capsys, *args)[1]
        assert all(c.isprintable() or c == '\n' for c in said) and 'x1b' in said


def test_a_fault_of_ours_is_not_called_a_mismatch(photos, capsys, monkeypatch):
    monkeypatch.setattr(cli, 'expected_stats', lambda *a: 1/0)
    monkeypatch.setattr(sys, 'argv', ['normx', 'check', str(photos), 'resnet50'])
    with pytest.raises(SystemExit) as e: cli.main()
    assert e.value.code == 2 and 'ZeroDivisionError' in capsys.readouterr().err


@pytest.mark.parametrize('command', ['check {photos} {config}', 'expected {config}'])
def test_nobody_to_write_to(photos, command):
    "A full disk, a reader that is gone, and letters that the terminal does not have"
    config = NormStats(.5, .5, 'Mü ☃').save(photos/'cfg.json')
    (photos/'ü.png').touch()
    run = f'{sys.executable} -c "from fastai_normx.cli import main; main()" '+command.format(photos=photos, config=config)
    for to, codes in (('> /dev/full', {2}), ('| exit 0', {2}), ('| cat', {0})):
        r = subprocess.run(['bash', '-c', f'{run} {to}; exit ${{PIPESTATUS[0]}}'], capture_output=True, text=True,
            env=os.environ | dict(PYTHONIOENCODING='ascii'))
        assert r.returncode in codes and 'Traceback' not in r.stderr and 'ignored' not in r.stderr, (to, r)


# Image files

pixels = np.random.default_rng(1).integers(0, 256, (24, 16, 3), dtype=np.uint8)


def read(*args, **kw):
    "`ChannelStats` and what was said, or the error; within a minute"
    def f():
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            s = data_stats(*args, progress=False, **kw)
        return s, [str(w.message) for w in ws if issubclass(w.category, NormxWarning)]
    return within(60, f)


def write(kind, f):
    "An image file of an odd kind"
    im, alpha = Image.fromarray(pixels), np.arange(24*16, dtype=np.uint8).reshape(24, 16)
    if kind == 'CMYK': im.convert('CMYK').save(f, 'JPEG')
    if kind == 'palette': im.convert('P', palette=Image.Palette.ADAPTIVE, colors=17).save(f, 'PNG')
    if kind == 'transparent palette': im.convert('P', palette=Image.Palette.ADAPTIVE, colors=17).save(f, 'PNG',
        transparency=bytes(range(17)))
    if kind == 'alpha': Image.fromarray(np.dstack([pixels, alpha])).save(f, 'PNG')
    if kind == 'grey and alpha': Image.fromarray(np.dstack([pixels[..., 0], alpha])).save(f, 'PNG')
    if kind == 'black and white': im.convert('1').save(f, 'PNG')
    if kind == 'animated GIF': im.save(f, 'GIF', save_all=True, append_images=[Image.fromarray(255-pixels)]*3)
    if kind == 'animated PNG': im.save(f, 'PNG', save_all=True, append_images=[Image.fromarray(255-pixels)]*3)
    if kind == 'two pages': im.save(f, 'TIFF', save_all=True, append_images=[Image.fromarray(255-pixels)])
    if kind == 'PNG that calls itself JPEG': im.save(f, 'PNG')
    if kind == 'one pixel': im.crop((0, 0, 1, 1)).save(f, 'PNG')
    if kind == 'one line': im.resize((9999, 1)).save(f, 'PNG')
    return f


@pytest.mark.parametrize('kind', ['CMYK', 'palette', 'transparent palette', 'alpha', 'grey and alpha', 'black and white', 'animated GIF',
    'animated PNG', 'two pages', 'PNG that calls itself JPEG', 'one pixel', 'one line'])
def test_odd_images_are_read_as_fastai_reads_them(tmp_path, kind):
    f = write(kind, tmp_path/'a.jpg')
    x = np.asarray(PILImage.create(f))/255  # the first frame, in RGB
    for source in (tmp_path, f, [f]):
        s, said = read(source)
        assert len(s) == 1 and not said
        np.testing.assert_allclose(s.mean, x.mean((0, 1)), atol=1e-12)
        np.testing.assert_allclose(s.std, x.std((0, 1)), atol=1e-12)


@pytest.mark.parametrize('turn', range(1, 9))
def test_rotation_by_exif_changes_no_statistics(tmp_path, turn):
    exif = Image.Exif()
    exif[0x112] = turn
    Image.fromarray(pixels).save(tmp_path/'a.png', exif=exif)
    s, said = read(tmp_path)
    x = pixels/255
    assert not said
    np.testing.assert_allclose(s.mean, x.mean((0, 1)), atol=1e-12)
    np.testing.assert_allclose(s.within_std, x.std((0, 1)), atol=1e-12)


def broken_image(kind, f):
    "A file that cannot be read as an image, under a name of one"
    whole = io.BytesIO()
    Image.fromarray(pixels).save(whole, 'PNG' if 'PNG' in kind else 'JPEG')
    b = whole.getvalue()
    if kind == 'empty': f.touch()
    if kind.startswith('truncated'): f.write_bytes(b[:len(b)*2//3])
    if kind == 'header only': f.write_bytes(b[:40])
    if kind == 'text': f.write_text('<html>404 Not Found</html>')
    if kind == 'pickle': f.write_bytes(b'cos\nsystem\n(S"touch executed"\ntR.')
    if kind == 'zeros':
        with open(f, 'wb') as o: o.truncate(2**33)  # 8 GiB that take no place on disk
    if kind == 'bomb': f.write_bytes(bomb(50000, 50000))
    if kind == 'bomb of text': f.write_bytes(bomb(4, 4, b'x'*2**27))
    if kind == 'PostScript': f.write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(touch executed) print\n%%EOF\n')
    if kind == 'FIFO': os.mkfifo(f)
    if kind == 'device': f.symlink_to('/dev/zero')
    if kind == 'terminal': f.symlink_to('/dev/tty')
    if kind == 'dangling link': f.symlink_to(f.parent/'nowhere.png')
    if kind == 'circle of links':
        f.symlink_to(f.parent/'b.link')
        (f.parent/'b.link').symlink_to(f)
    if kind == 'socket':
        s, here = socket.socket(socket.AF_UNIX), os.getcwd()
        os.chdir(f.parent)  # the name of a socket must be short
        try: s.bind(f.name)
        finally: os.chdir(here)
        s.close()


def bomb(width, height, text=b''):
    "A PNG that is small on disk and large in memory"
    part = lambda kind, data: struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    head = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    note = part(b'zTXt', b'a\0\0'+zlib.compress(text)) if text else b''
    return b'\x89PNG\r\n\x1a\n'+part(b'IHDR', head)+note+part(b'IDAT', zlib.compress(bytes(10**6)))+part(b'IEND', b'')


no_images = ['empty', 'truncated JPEG', 'truncated PNG', 'header only', 'text', 'pickle', 'zeros', 'bomb', 'bomb of text', 'PostScript',
    'FIFO', 'device', 'terminal', 'dangling link', 'circle of links', 'socket']


@pytest.mark.parametrize('kind', no_images)
def test_what_is_no_image_is_named_once_and_left_out(photos, capsys, monkeypatch, actions, kind):
    (photos/'sub').mkdir()
    broken_image(kind, photos/'sub'/'a.jpg')
    monkeypatch.chdir(photos.parent)
    whole, _ = read(sorted(photos.glob('*.png')))
    for source in ('photos', Path('photos'), [str(f) for f in sorted(Path('photos').glob('*.png'))]+['photos/sub/a.jpg'], photos):
        s, said = read(source)
        assert len(s) == 4
        np.testing.assert_allclose(s.std, whole.std, rtol=1e-12)
        name = photos/'sub'/'a.jpg' if source is photos else 'photos/sub/a.jpg'
        assert len(said) == 1 and said[0].startswith('1 of 5 image files could not be read') and f' {name} (' in said[0]
    e = read('photos/sub')
    assert isinstance(e, ValueError) and "none of the 1 image files; 'photos/sub/a.jpg': " in str(e)
    assert within(60, lambda: deep_behind('photos')) is None
    code, told = within(60, lambda: normx(capsys, 'check', 'photos', 'resnet50'))
    assert code == 0 and told.count('a.jpg') == 1
    assert actions == []


def test_files_are_named_where_two_have_one_name(photos, monkeypatch):
    monkeypatch.chdir(photos)
    for d in ('a', 'b'):
        (photos/d).mkdir()
        (photos/d/'x.png').touch()
    said, = read('.')[1]
    assert sorted(re.findall(r'(\S+) \(UnidentifiedImageError\)', said)) == ['a/x.png', 'b/x.png']


def test_a_large_image_is_read(tmp_path):
    Image.new('RGB', (12000, 5000), (255, 0, 51)).save(tmp_path/'a.png')
    s, said = read(tmp_path)
    np.testing.assert_allclose(s.mean, [1, 0, .2], atol=1e-12)
    assert s.count.tolist() == [6*10**7]*3 and not said


def test_links_in_circles_count_a_photo_once(photos):
    (photos/'a'/'b').mkdir(parents=True)
    Image.fromarray(pixels).save(photos/'a'/'b'/'p.png')
    for n, to in (('self', photos), ('a/up', photos), ('a/b/up', photos/'a'), ('again', photos/'a'/'b')): (photos/n).symlink_to(to,
        target_is_directory=True)
    (photos/'x').symlink_to(photos/'y')
    (photos/'y').symlink_to(photos/'x')
    (photos/'p.png').symlink_to(photos/'a'/'b'/'p.png')
    (photos/'relative.png').symlink_to('0.png')
    s, said = read(photos)
    assert len(s) == 5 and not said
    (photos.parent/'link').symlink_to(photos, target_is_directory=True)
    assert read(photos.parent/'link') == (s, [])


def test_folders_far_inside_others(tmp_path):
    here, fd = os.getcwd(), []
    try:
        os.chdir(tmp_path)
        Image.fromarray(pixels).save('first.png')
        for _ in range(1500):  # deeper than Python calls itself
            os.mkdir('d')
            os.chdir('d')
        Image.fromarray(pixels).save('last.png')
    finally: os.chdir(here)
    os.chdir(tmp_path)
    try:
        s, said = read('.')
        assert len(s) == 2 and not said
    finally:
        os.chdir(here)
        subprocess.run(['rm', '-rf', str(tmp_path/'d')])


def test_folders_and_files_without_permission_are_named(unreadable):
    path, as_nobody = unreadable
    for i in range(3): Image.fromarray(pixels).save(path/f'{i}.png')
    (path/'closed').mkdir()
    Image.fromarray(pixels).save(path/'closed'/'3.png')
    whole, _ = read(path)
    assert len(whole) == 4
    os.chmod(path/'closed', 0)
    os.chmod(path/'0.png', 0)
    s, said = as_nobody(lambda: read(path))
    assert len(s) == 2 and len(said) == 1 and f'{path}/closed (PermissionError)' in said[0] and f'{path}/0.png (PermissionError)' in said[0]
    e = as_nobody(lambda: read(path/'closed'))
    assert isinstance(e, ValueError) and re.search("closed' cannot be read: Permission denied", str(e))


def test_files_that_are_deleted_meanwhile(photos, monkeypatch):
    real = stats._open
    def slow(f):
        if f.name == '2.png': f.unlink()
        return real(f)
    monkeypatch.setattr(stats, '_open', slow)
    s, said = read(photos)
    assert len(s) == 3 and len(said) == 1 and '2.png (FileNotFoundError)' in said[0]
    listed, scandir = [], os.scandir
    (photos/'a').mkdir()
    def gone(p):
        if str(p).endswith('/a'): os.rmdir(p)
        return scandir(p)
    monkeypatch.setattr(os, 'scandir', gone)
    s, said = read(photos)
    assert len(s) == 3 and len(said) == 1 and 'photos/a (FileNotFoundError)' in said[0]


def test_odd_names_of_folders():
    for name in ('', '\0', 'a'*5000, '\ud800', 'no/such', '~nobody'):
        with pytest.raises(ValueError, match='does not exist: check the path'): data_stats(name)


if __name__ == '__main__':  # a table of what goes wrong: `python tests/test_hostile.py 10000`
    import tempfile
    with tempfile.TemporaryDirectory() as t: found = faults(range(int(sys.argv[1])), Path(t)/'model')
    print(Counter(f.partition(':')[0].partition(' of ')[0] for f in found.values()), len(found), 'of', sys.argv[1])
    for kind in dict.fromkeys(f.partition(':')[0] for f in found.values()):
        for seed, f in [(k, f) for k, f in found.items() if f.startswith(kind)][:12]: print(seed, f)
