"What Pillow does to image files with more than 8 bits, and which files are behind a loader; numpy in float64 is the judge."
import os, random, struct, threading, zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import (CategoryBlock, ColReader, DataBlock, DataLoaders, Datasets, ImageBlock, ImageDataLoaders, IndexSplitter, Learner, PILImage, PILImageBW,
    PILMask, TfmdDL, TfmdLists, ToTensor, Transform, get_image_files, noop)
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder

from fastai_normx.files import DeepFiles, _files, deep_behind, deep_files, files_behind


def ramp(top, dtype=np.uint16, least=0): return np.linspace(least, top, 64*64).round(0 if np.dtype(dtype).kind != 'f' else 9).reshape(64, 64).astype(dtype)


def save(f, x):
    Image.fromarray(x).save(f)
    return f


def png16(f, channels, values):
    "A colour PNG of 16 bits, which Pillow cannot write"
    x = np.stack([values]*channels, -1).astype('>u2')
    part = lambda kind, data: struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    head = struct.pack('>IIBBBBB', *values.shape[::-1], 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b''.join(b'\0'+row.tobytes() for row in x)
    f.write_bytes(b'\x89PNG\r\n\x1a\n'+part(b'IHDR', head)+part(b'IDAT', zlib.compress(rows))+part(b'IEND', b''))
    return f


def tiff12(f, values):
    "A TIFF that packs two values of 12 bits in three bytes"
    p = values.ravel().astype(np.uint32)
    b = np.empty(p.size*3//2, np.uint8)
    b[0::3], b[1::3], b[2::3] = p[0::2] >> 4, ((p[0::2] & 15) << 4) | (p[1::2] >> 8), p[1::2] & 255
    h, w = values.shape
    tags = [(256, w), (257, h), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, h), (279, len(b)), (339, 1)]
    entries = b''.join(struct.pack('<HHII', t, 4, 1, v) for t, v in tags)
    f.write_bytes(b'II*\0'+struct.pack('<I', 8+len(b))+b.tobytes()+struct.pack('<H', len(tags))+entries+struct.pack('<I', 0))
    return f


def opened(deep, f):
    "What the advised code, run as it is printed, makes of `f`"
    scope = {}
    exec(deep.advice, scope)
    return np.asarray(scope['open_deep'](f))


# name, values, bits, the value that is to be black, the one that is to be white; None: nothing is lost
kinds = [('10.png', ramp(1023), 10, 0, 1023), ('12.png', ramp(4095), 12, 0, 4095), ('almost.png', ramp(3900), 12, 0, 4095), ('14.tif', ramp(16383), 14, 0, 16383),
    ('16.png', ramp(65535), 16, 0, 65535), ('16.tif', ramp(65535), 16, 0, 65535), ('big endian.tif', ramp(4095).astype('>u2'), 12, 0, 4095), ('int32.tif', ramp(4095, np.int32), 12, 0, 4095),
    ('16.jp2', ramp(65535), 16, 0, 65535), ('float16bit.tif', ramp(65535, np.float32), None, 0, 65535), ('whole floats.tif', ramp(4095, np.float32).round(), 12, 0, 4095),
    ('unit.tif', ramp(1, np.float32), None, 0, 1), ('almost unit.tif', ramp(.93, np.float32), None, 0, 1), ('tiny.tif', ramp(.01, np.float32), None, 0, .01),
    ('metres.tif', ramp(80.5, np.float32), None, 0, 80.5), ('signed.tif', ramp(3071, np.int32, -1024), None, -1024, 3071), ('normalized.tif', ramp(2.64, np.float32, -2.12), None, -2.12, 2.64),
    ('never black.tif', ramp(80.5, np.float32, 5), None, 0, 80.5), ('32 bits.tif', ramp(10**6, np.int32), None, 0, 10**6)]


@pytest.mark.parametrize('name,values,bits,black,white', kinds, ids=[k[0] for k in kinds])
def test_deep_files_are_named_and_the_advice_mends_them(tmp_path, name, values, bits, black, white):
    f = save(tmp_path/name, values)
    deep = deep_files([f])
    assert deep.bits == bits and deep.n_looked == 1 and deep.files == (f,)
    assert deep.top == pytest.approx(float(values.max())) and deep.least == pytest.approx(float(values.min()))
    want = (values.astype(np.float64)-black)*255/(white-black)
    got = opened(deep, f)
    assert got.shape == (64, 64, 3) and np.abs(got-want[..., None]).max() <= .501
    assert np.abs(np.asarray(Image.open(f).convert('L'))-want).max() > 50  # what happens without it
    assert len(str(deep).split()) <= 40 and len(deep.advice.splitlines()) <= 3 and '257' not in deep.advice


def test_packed_12_bits(tmp_path):
    f = tiff12(tmp_path/'a.tif', ramp(4095))
    deep = deep_files([f])
    assert deep.bits == 12 and np.abs(opened(deep, f)[..., 1]-ramp(4095)*(255/4095)).max() <= .5


def test_the_words():
    made = lambda **kw: str(DeepFiles(**dict(files=('a.png',)*3, n_looked=4, least=0, top=4092)|kw))
    assert made() == '3 of 4 image files hold more than 8 bits: their greatest value is 4,092, so 12 bits. Pillow clips them at 255.'
    assert made(top=.75, floats=True) == '3 of 4 image files hold floats, from 0 to 0.75. Pillow makes whole numbers from 0 to 255 of them.'
    assert made(least=-1024, top=3071) == '3 of 4 image files hold values from -1,024 to 3,071. Pillow clips them to 0-255.'


@pytest.mark.parametrize('top,bits', [(256, 10), (1023, 10), (1024, 12), (4095, 12), (4096, 14), (16383, 14), (16384, 16), (65535, 16), (65536, None)])
def test_bits_on_either_side(tmp_path, top, bits): assert deep_files([save(tmp_path/'a.tif', ramp(top, np.int32))]).bits == bits


@pytest.mark.parametrize('values', [ramp(255), ramp(100), ramp(255, np.int32), ramp(255, np.float32), ramp(200.5, np.float32), ramp(128, np.float32), np.zeros((8, 8), np.uint16), ramp(9, np.float32).round()])
def test_values_that_pillow_leaves_as_they_are(tmp_path, values):
    f = save(tmp_path/'a.tif', values)
    assert np.abs(np.asarray(Image.open(f).convert('L'))-values.astype(np.float64)).max() < 1
    assert deep_files([f]) is None


@pytest.mark.parametrize('make', [lambda f: png16(f, 3, ramp(65535)), lambda f: png16(f, 4, ramp(65535)), lambda f: save(f, ramp(255, np.uint8)),
    lambda f: Image.fromarray(ramp(255, np.uint8)).convert('1').save(f) or f, lambda f: Image.fromarray(ramp(255, np.uint8)).convert('P').save(f) or f])
def test_other_files_are_no_concern(tmp_path, make):
    f = make(tmp_path/'a.png')
    assert deep_files([f]) is None


def test_colour_of_16_bits_is_read_as_its_high_bytes(tmp_path):
    seen = np.asarray(PILImage.create(png16(tmp_path/'a.png', 3, ramp(65535))))
    assert np.array_equal(seen[..., 0], ramp(65535) >> 8)


def test_nan_in_floats_and_nothing_else(tmp_path):
    x = ramp(1, np.float32)
    x[0, :3] = np.nan, np.inf, -np.inf
    deep = deep_files([save(tmp_path/'a.tif', x)])
    assert (deep.least, deep.top, deep.floats) == (pytest.approx(x[0, 3]), 1, True)
    assert deep_files([save(tmp_path/'b.tif', np.full((8, 8), np.nan, np.float32))]) is None


def test_mixed_folders_and_what_cannot_be_read(tmp_path):
    for i in range(6): save(tmp_path/f'{i}.png', ramp(4095) if i % 2 else ramp(255, np.uint8))
    (tmp_path/'6.png').write_bytes(b'nothing')
    deep = deep_files(sorted(tmp_path.glob('*.png')))
    assert (len(deep.files), deep.n_looked) == (3, 6)
    for f in sorted(tmp_path.glob('[0-5].png')):
        x = np.asarray(Image.open(f)).astype(np.float64)
        assert np.abs(opened(deep, f)[..., 0]-x*(255/4095 if x.max() > 255 else 1)).max() <= .5
    grey = deep_files([tmp_path/'1.png'], mode='L')
    assert opened(grey, tmp_path/'1.png').shape == (64, 64)


def test_values_above_what_was_seen_are_white_not_wrapped(tmp_path):
    deep = deep_files([save(tmp_path/'a.png', ramp(4000))])
    assert opened(deep, save(tmp_path/'b.png', np.full((4, 4), 60000, np.uint16))).min() == 255


def test_headers_of_few_and_values_of_fewer(tmp_path, monkeypatch):
    from fastai_normx import files as m
    f, opens = save(tmp_path/'a.png', ramp(4095)), []
    real = m._open
    monkeypatch.setattr(m, '_open', lambda f: opens.append(f) or real(f))
    deep = deep_files([f]*1000)
    assert deep.n_looked <= 64 and len(opens) <= 64+16
    opens.clear()
    names = [tmp_path/f'{i}.png' for i in range(1000)]
    assert deep_files(names, most=5) is None and opens == [names[i] for i in (0, 249, 499, 749, 999)]


# Folders

def test_a_link_to_itself_a_pipe_and_a_link_to_nowhere(tmp_path):
    (tmp_path/'a').mkdir()
    for i in range(2): save(tmp_path/'a'/f'{i}.png', ramp(255, np.uint8))
    (tmp_path/'a'/'loop').symlink_to(tmp_path, target_is_directory=True)
    (tmp_path/'b').symlink_to(tmp_path/'a', target_is_directory=True)
    (tmp_path/'same.png').symlink_to(tmp_path/'a'/'0.png')
    (tmp_path/'.hidden.png').symlink_to(tmp_path/'a'/'0.png')
    assert sorted(os.path.realpath(f) for f in _files(tmp_path)) == [str(tmp_path/'a'/f'{i}.png') for i in range(2)]
    (tmp_path/'gone.png').symlink_to(tmp_path/'nowhere.png')
    os.mkfifo(tmp_path/'pipe.png')
    assert {f.name for f in _files(tmp_path)} >= {'gone.png', 'pipe.png'} and len(_files(tmp_path)) == 4
    done = []
    t = threading.Thread(target=lambda: done.append(deep_files(_files(tmp_path))), daemon=True)
    t.start()
    t.join(20)
    assert done == [None]


def test_the_same_files_as_fastai(tmp_path):
    for n in ('a.png', 'b.JPG', 'c.txt', '.d.png', 'e', 'f.tiff'): (tmp_path/n).touch()
    (tmp_path/'.h').mkdir()
    (tmp_path/'.h'/'g.png').touch()
    (tmp_path/'i.png').mkdir()
    (tmp_path/'i.png'/'j.png').touch()
    assert set(_files(tmp_path)) == set(get_image_files(tmp_path)) and len(_files(tmp_path)) == 4


# Behind loaders

@pytest.fixture
def deep_folder(tmp_path):
    for i in range(12):
        (tmp_path/f'{i % 2}').mkdir(exist_ok=True)
        save(tmp_path/f'{i % 2}'/f'{i:02}.png', (ramp(4095)//(1+i % 3)))
    return tmp_path


split = IndexSplitter([0, 5, 7])


def at_random(f):
    "A user's getter that draws from every generator"
    random.random(), np.random.rand(), torch.rand(1)
    return f


def drawn(path): return DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_x=at_random, get_y=lambda f: f.parent.name, splitter=split).dataloaders(path, bs=2, num_workers=0)


def from_block(path): return DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=lambda f: f.parent.name, splitter=split).dataloaders(path, bs=2, num_workers=0)


def from_table(path):
    df = pd.DataFrame([(f'{f.parent.name}/{f.stem}', f.parent.name) for f in sorted(path.rglob('*.png'))], columns=['image', 'label'])
    return DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('image', pref=path, suff='.png'), get_y=ColReader('label'), splitter=split).dataloaders(df, bs=2, num_workers=0)


def from_df(path):
    df = pd.DataFrame([(f'{f.parent.name}/{f.name}', f.parent.name) for f in sorted(path.rglob('*.png'))], columns=['image', 'label'])
    return ImageDataLoaders.from_df(df, path, bs=2, num_workers=0, valid_pct=.25)


def from_datasets(path):
    fs = get_image_files(path)
    return Datasets(fs, [[lambda f: str(f), PILImage.create], [lambda f: f.parent.name]], splits=split(fs)).dataloaders(bs=2, num_workers=0, after_item=ToTensor)


def two_inputs(path):
    fs = get_image_files(path)
    ds = Datasets(fs, [[lambda f: len(f.name)], [PILImage.create], [lambda f: 1.]], splits=split(fs), n_inp=2)
    return DataLoaders(TfmdDL(ds.train, bs=2), TfmdDL(ds.valid, bs=2))


fastai_ways = [from_block, drawn, from_table, from_df, from_datasets, two_inputs, lambda p: ImageDataLoaders.from_folder(p, valid_pct=.25, bs=2, num_workers=0)]


@pytest.mark.parametrize('make', fastai_ways)
def test_files_behind_fastai_loaders(deep_folder, make):
    dls, state = make(deep_folder), (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy())
    files = [os.path.abspath(f) for dl in dls.loaders for f in files_behind(dl)]
    assert sorted(files) == sorted(map(str, deep_folder.rglob('*.png')))
    deep = deep_behind(dls)
    assert deep.bits == 12 and len(deep.files) == deep.n_looked == 12
    assert deep_behind(Learner(dls, torch.nn.Identity(), loss_func=noop)) == deep and len(deep_behind(dls.train).files) < 12
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1]) and np.array_equal(np.random.get_state()[1], state[2])


def test_files_behind_torch_loaders(deep_folder):
    ds = ImageFolder(deep_folder)
    for src in (ds, DataLoader(ds, 2), DataLoaders.from_dsets(ds, ds, bs=2, num_workers=0).train):
        assert list(files_behind(src)) == [f for f, _ in ds.samples]
    sub = Subset(Subset(ds, [3, 4, 5, 6]), torch.tensor([2, 0]))
    assert list(files_behind(DataLoader(sub, 2))) == [ds.samples[i][0] for i in (5, 3)]
    assert deep_behind(DataLoader(ds, 2)).bits == 12 and deep_behind(Subset(ds, [1])).n_looked == 1
    # the advice, as a loader for torchvision
    scope = {}
    exec(deep_behind(ds).advice, scope)
    mended = ImageFolder(deep_folder, loader=scope['open_deep'])
    assert files_behind(mended) is None
    want = np.asarray(Image.open(ds.samples[0][0])).astype(np.float64)*255/4095
    assert np.abs(np.asarray(mended[0][0])[..., 2]-want).max() <= .5


@pytest.mark.parametrize('cls', [PILImage, PILImageBW])
def test_the_advice_in_a_fastai_pipeline(deep_folder, cls):
    def make(**kw):
        db = DataBlock((ImageBlock(cls), CategoryBlock), get_items=lambda p: get_image_files(p).sorted(), get_y=lambda f: f.parent.name, splitter=split, **kw)
        return db.dataloaders(deep_folder, bs=12, num_workers=0)
    scope = {}
    exec(deep_behind(make()).advice, scope)
    dls = make(get_x=scope['open_deep'])
    assert deep_behind(dls) is None
    x = dls.valid.one_batch()[0].double().cpu().numpy()
    want = np.stack([np.asarray(Image.open(f)).astype(np.float64)/4095 for f in get_image_files(deep_folder).sorted()[[0, 5, 7]]])[:, None]
    assert x.shape[1] == (3 if cls is PILImage else 1) and np.abs(x-want).max() <= .501/255


class Own(PILImage):
    @classmethod
    def create(cls, fn, **kw): return cls(Image.open(fn).convert('F').point(lambda v: v*(255/4095)).convert('RGB'))


class Keeps(PILImage): _open_args = dict(mode='F')


class Raises(Dataset):
    loader = samples = property(lambda self: 1/0)
    def __len__(self): raise RuntimeError
    def __getitem__(self, i): raise RuntimeError


def open_image(f): return PILImage.create(f)


def test_not_known_is_none(deep_folder):
    fs = get_image_files(deep_folder)
    for tfm in (Own.create, Keeps.create, open_image, lambda f: np.asarray(Image.open(f))):
        assert files_behind(TfmdDL(TfmdLists(fs, [tfm]), bs=2)) is None
    arrays = [np.zeros((8, 8, 3), np.uint8)]*4
    assert files_behind(TfmdDL(TfmdLists(arrays, [PILImage.create]), bs=2)) is None
    fails = TfmdLists(fs, [PILImage.create])
    fails.tfms.fs.insert(0, Transform(lambda f: 1/0))
    others = [DataLoader(TensorDataset(torch.rand(4, 3, 8, 8))), FakeData(3), DataLoader(Raises()), Raises(), fails, DataLoader([1, 2]), 3, None, 'no/such', [], {}, [torch.rand(2, 3, 8, 8)],
              DataLoaders(), (x for x in [1]), ConcatDataset([ImageFolder(deep_folder)]), fs.map(str)[:0], pd.DataFrame({'a': [1]})]
    for o in others: assert files_behind(o) is None and deep_behind(o) is None, o
    gen = iter([1, 2])
    deep_behind(gen)
    assert next(gen) == 1


def test_masks_are_targets_not_images(deep_folder):
    fs = get_image_files(deep_folder)
    ds = Datasets(fs, [[lambda f: torch.rand(3, 4, 4)], [PILMask.create]])
    assert files_behind(TfmdDL(ds, bs=2)) is None


def test_no_pixel_is_read_and_one_item_is_looked_at(deep_folder, monkeypatch):
    calls, fs = [], get_image_files(deep_folder)
    def getter(f): calls.append(f); return f
    dl = TfmdDL(Datasets(fs, [[getter, PILImage.create], [lambda f: 1]]), bs=2)
    calls.clear()
    monkeypatch.setattr(Image.Image, 'load', None)
    behind = files_behind(dl)
    assert len(behind) == 12 and len(calls) == 1 and behind[-1] == fs[-1]
