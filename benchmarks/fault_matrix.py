"""Which faults of an input pipeline `stats_match` names, which it misses, and how often it cries wolf.

    python benchmarks/fault_matrix.py [--data FOLDER] [--images 64] [--json FILE]
    python benchmarks/fault_matrix.py --severity --data FOLDER [--json FILE]

Each fault is made in the pipelines of backbones from six families of constants, on four kinds of images (natural photographs,
photographs of solar cells, handwritten digits, faces), through three loaders: fastai's, PyTorch's, and PyTorch's with
augmentation that interpolates floats. The right pipelines are tried with 8 images in one batch, 64 and 192, and with images
that are dark, pale (little contrast, no black and no white) and negative.

named         the worst finding has the kind of the fault
wrongly named it has another kind
cannot tell   the report says so: nothing in these values shows what was done to them
missed        the report says ok
not shown     the data cannot hold this fault: grey images have no channel order
suspicion     a warning of severity "warning" on a right pipeline: the colours of negatives are those of BGR

--data: a folder of photographs, for example a sample of ImageNet; without it tiles of scikit-learn's two photographs are used.
Solar cells need `pip install elpv-dataset` (licence: not for commercial use) and are left out without it.

--severity: how well the estimate of harm (`Finding.harm`), and the share of answers that change (`impact`, no labels needed),
rank pipelines as their measured loss of accuracy does: EfficientNet-Lite0 with ImageNet weights, BatchNorm frozen. FOLDER holds
images with a `labels.csv` (columns file and class_index).
"""
import argparse, csv, json, platform, sys, warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path

warnings.filterwarnings('ignore', category=FutureWarning)
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2 as T

from fastai.vision.all import CategoryBlock, DataBlock, DataLoaders, ImageBlock, IndexSplitter, Normalize, TensorImage, Transform, aug_transforms, get_image_files
from fastai_normx.all import expected_stats, stats_match
from fastai_normx.constants import Affine
from fastai_normx.expected import ExpectedStatsWarning
from machine import cpu_name

families = {'ImageNet': 'resnet18', '0.5/0.5': 'tf_efficientnet_lite0', 'CLIP': 'vit_base_patch32_clip_224.openai', '0/1': 'fastvit_mci0.apple_mclip', 'DPN': 'dpn68', 'satellite': 'vit_large_patch16_dinov3.sat493m'}
plain = (0, 0, 0), (1, 1, 1)


def photographs(folder, n, size=64):
    "uint8 `[n,3,size,size]`: the shorter side resized to `size`, centre cropped"
    if folder is None:
        from sklearn.datasets import load_sample_images
        rng, ims = np.random.default_rng(0), load_sample_images().images
        at = [(ims[i % 2], rng.integers(0, 427-size), rng.integers(0, 640-size)) for i in range(n)]
        return torch.stack([torch.tensor(im[y:y+size, x:x+size]).permute(2, 0, 1) for im, y, x in at])
    files = sorted(get_image_files(folder))
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:n]]
    tfm = T.Compose([T.Resize(size), T.CenterCrop(size), T.PILToTensor()])
    return torch.stack([tfm(Image.open(f).convert('RGB')) for f in files])


def images(folder, n):
    "Name -> uint8 images `[n,3,H,W]`"
    from skimage.data import lfw_subset
    from sklearn.datasets import load_digits
    grey = lambda a: torch.tensor(np.asarray(a)).to(torch.uint8)[:n, None].expand(-1, 3, -1, -1).contiguous()
    res = {'natural': photographs(folder, n)}
    try: from elpv_dataset.utils import load_dataset
    except ImportError: print('Without solar cells: pip install elpv-dataset', file=sys.stderr)
    else: res['industrial'] = grey(load_dataset()[0][::6, ::4, ::4])
    res['digits'] = grey(load_digits().images[:n].repeat(4, 1).repeat(4, 2)*15.9375)
    res['faces'] = grey((lfw_subset()*255).round())
    return res


def const(c): return [torch.as_tensor(o, dtype=torch.float32).view(-1, 1, 1) for o in c]
def norm(*cs):
    "A function that normalizes with each of `cs` in turn"
    def f(x):
        for m, s in map(const, cs): x = (x-m)/s
        return x
    return f


class Images(Dataset):
    def __init__(self, px, f, augment=None): self.px, self.f, self.augment = px, f, augment
    def __len__(self): return len(self.px)
    def __getitem__(self, i): return self.f(self.augment(self.px[i]/255) if self.augment else self.px[i]/255), 0


def torch_loader(px, f, bs, augment=None): return DataLoader(Images(px, f, augment), bs, shuffle=True)

def augment(size):
    return T.Compose([T.RandomResizedCrop(size, (.5, 1), antialias=True), T.RandomHorizontalFlip(), T.RandomRotation(5, T.InterpolationMode.BILINEAR), T.ColorJitter(.2, .2)])


def fastai_loader(px, before, cs, bs, valid_cs=None):
    "A `DataLoaders` whose `Normalize`s hold the constants `cs`, after the function `before` on [0,1] pixels"
    class Before(Transform):
        order = 98  # after augmentation, before Normalize
        def encodes(self, x: TensorImage): return before(x)
    ims = px.permute(0, 2, 3, 1).numpy()
    class Then(Normalize): pass  # fastai keeps one transform of each type
    class Last(Then): pass
    tfms = [t.from_stats(*c) for t, c in zip((Normalize, Then, Last), cs)]
    if before: tfms.insert(0, Before())
    db = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: ims[i], get_y=lambda i: i % 2, splitter=IndexSplitter(range(len(px)//2, len(px))), batch_tfms=[*aug_transforms(), *tfms])
    dls = db.dataloaders(list(range(len(px))), bs=bs, num_workers=0)
    if valid_cs: dls.valid.after_batch.fs = dls.valid.after_batch.fs.filter(lambda t: not isinstance(t, Normalize)) + [Normalize.from_stats(*c) for c in valid_cs]
    return dls


def faults(E, px):
    "`(kind, name, constants in turn, function on [0,1] pixels before them or None, pixels)`"
    E, imagenet = tuple(E), ((.485, .456, .406), (.229, .224, .225))
    other = ((.5,)*3, (.5,)*3) if np.allclose(E[0], imagenet[0], atol=.01) else imagenet
    scale = lambda k: lambda x: x*k
    def hole(x): x = x.clone(); x[..., 0, 0] = float('nan'); return x
    def dead(x): x = x.clone(); x[..., 2, :, :] = 0; return x
    if E != plain: yield 'not_normalized', 'no Normalize', [], None, px
    if E != plain: yield 'normalized_twice', 'twice', [E, E], None, px
    yield 'wrong_stats', "another family's constants", [other], None, px
    yield 'wrong_range', 'pixels in 0-255', [], scale(255), px
    yield 'wrong_range', 'normalized, on pixels in 0-255', [E], scale(255), px
    yield 'wrong_range', 'divided by 255 twice, then normalized', [E], scale(1/255), px
    yield 'channel_order', 'images in BGR', [E], None, px.flip(1)
    if E != tuple(o[::-1] for o in E): yield 'channel_order', 'constants in BGR', [tuple(o[::-1] for o in E)], None, px
    yield 'channel_count', 'one channel', [], lambda x: x[..., :1, :, :], px
    yield 'channel_count', 'four channels', [], lambda x: torch.cat([x, x[..., :1, :, :]], -3), px
    yield 'non_finite', 'a NaN', [E], hole, px
    yield 'constant_channel', 'no blue', [E], dead, px


class Inside(nn.Module):
    "A model that normalizes its input"
    def __init__(self, E): super().__init__(); self.pixel_mean, self.pixel_std = const(E)
    def forward(self, x): return norm((self.pixel_mean.flatten(), self.pixel_std.flatten()))(x)


def load(px, how, cs, before, bs, **kw):
    if how == 'fastai': return fastai_loader(px, before, cs, bs, **kw)
    f = norm(*cs)
    return torch_loader(px, lambda x: f(before(x) if before else x), bs, augment(px.shape[-1]) if 'augment' in how else None)


def ask(data, source, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ExpectedStatsWarning)
        return stats_match(data, source, warn=False, **kw)


looks = {'': lambda x: x, 'dark': lambda x: (x*.3).to(torch.uint8), 'pale': lambda x: (x*.3+150).to(torch.uint8), 'negative': lambda x: 255-x}
hows = 'fastai', 'PyTorch', 'PyTorch, float augmentation'

def matrix(sets, n):
    "Rows `(kind, name, family, images, loader, verdict, what was said)`"
    rows = []
    def note(*row): rows.append(row); print('.' if row[5] in ('named', 'right', 'not shown') else f'\n{row}\n', end='', file=sys.stderr, flush=True)
    for fam, source in families.items():
        for data, px in sets.items():
            for how in hows:
                E = expected_stats(source)
                def verdict(r, kind): return 'named' if r.kind == kind else 'cannot tell' if r.outcome == 'cannot tell' else 'missed' if r.ok else 'wrongly named'
                for kind, name, cs, before, pixels in faults(E, px[:n]):
                    r = ask(load(pixels, how, cs, before, 32), source)
                    v = 'not shown' if name == 'images in BGR' and data != 'natural' else verdict(r, kind)
                    note(kind, name, fam, data, how, v, f'{r.outcome}: {r.kind}')
                if tuple(E) != plain:
                    dls = fastai_loader(px[:n], None, [tuple(E)], 32, []) if how == 'fastai' else DataLoaders(*[load(px[:n], how, cs, None, 32) for cs in ([tuple(E)], [])])
                    if how == 'fastai': dls.valid.after_batch.fs = dls.valid.after_batch.fs.filter(lambda t: not isinstance(t, Normalize))
                    note('split_mismatch', 'validation not normalized', fam, data, how, verdict(r := ask(dls, source), 'split_mismatch'), f'{r.outcome}: {r.kind}')
                    note('in_model', 'the model normalizes too', fam, data, how, verdict(r := ask(load(px[:n], how, [tuple(E)], None, 32), source, model=Inside(E)), 'in_model'), f'{r.outcome}: {r.kind}')
                for bs, k, look in ((8, 8, ''), (64, 64, ''), (64, 192, ''), (64, 64, 'dark'), (64, 64, 'pale'), (64, 64, 'negative')):
                    pixels = looks[look](px[:2*k if how == 'fastai' else k])
                    r = ask(load(pixels, how, [tuple(E)], None, bs), source)
                    note('', f'right, {k} images {look}'.strip(), fam, data, how, 'right' if r.outcome != 'mismatch' else 'false alarm' if r.findings[0].severity == 'error' else 'suspicion', f'{r.outcome}: {r.kind}')
    return rows


def table(rows, by, cols):
    "Print counts of verdicts, and return them"
    res = {k: Counter(r[5] for r in rows if by(r) == k) for k in dict.fromkeys(by(r) for r in rows)}
    print('\n| ' + ' | '.join(['', *cols]) + ' |\n|---|' + '---:|'*len(cols))
    for k, c in res.items(): print(f'| {k} | ' + ' | '.join(str(c[o] or '') for o in cols) + ' |')
    return res


def environment():
    return dict(cpu=cpu_name(), threads=torch.get_num_threads(), python=platform.python_version(), **{k: version(k) for k in ('fastai_normx', 'fastai', 'torch', 'timm')})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, help='folder of photographs')
    p.add_argument('--images', type=int, default=128, help='images for each fault')
    p.add_argument('--severity', action='store_true', help='rank correlation of harm with measured loss')
    p.add_argument('--json', type=Path, help='write the results to this file')
    a = p.parse_args()
    if a.data and not a.data.exists(): p.error(f'--data {str(a.data)!r} does not exist: pass a folder of photographs')
    env = environment()
    if a.severity: res = severity(a.data, p)
    else:
        rows = matrix(images(a.data, 400), a.images)
        bad, right = [r for r in rows if r[0]], [r for r in rows if not r[0]]
        cols = 'named', 'wrongly named', 'missed', 'cannot tell', 'not shown'
        by = dict(fault=lambda r: f'{r[0]}: {r[1]}', loader=lambda r: r[4], images=lambda r: r[3], family=lambda r: r[2])
        res = {k: table(bad, f, cols) for k, f in by.items()}
        res['right'] = table(right, lambda r: r[1], ('right', 'suspicion', 'false alarm'))
        res['total'] = dict(faults=Counter(r[5] for r in bad), right=Counter(r[5] for r in right), right_cannot_tell=sum('cannot' in r[6] for r in right))
        print(f'\n{res["total"]}')
    print(json.dumps(env))
    if a.json: a.json.write_text(json.dumps(dict(environment=env, **res), indent=1)+'\n')


def severity(folder, p):
    "Accuracy, estimated harm and share of changed answers for pipelines around EfficientNet-Lite0"
    if folder is None or not (folder/'labels.csv').exists(): p.error('--severity needs --data FOLDER with images and a labels.csv (columns file and class_index)')
    import timm
    from scipy.stats import spearmanr
    from fastai_normx.cli import _lite0_weights
    from fastai_normx.evidence import _harm
    m = timm.create_model('tf_efficientnet_lite0').eval()
    m.load_state_dict(_lite0_weights())
    rows = list(csv.DictReader(open(folder/'labels.csv')))
    tfm = T.Compose([T.Resize(256, T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.PILToTensor()])
    px, y = torch.stack([tfm(Image.open(next(folder.rglob(r['file']))).convert('RGB')) for r in rows]), torch.tensor([int(r['class_index']) for r in rows])
    E, I, C = (expected_stats(families[k]) for k in ('0.5/0.5', 'ImageNet', 'CLIP'))
    scale = lambda c, k: tuple(tuple(v*k for v in o) for o in c)
    own = [px.float().div(255).movedim(1, 0).flatten(1)]
    own = own[0].mean(1).tolist(), own[0].std(1).tolist()
    d = (px[:, 0].float().mean((1, 2))-px[:, 2].float().mean((1, 2)))/255
    colour = dict(mean=d.mean().item(), std=d.std().item())
    cases = dict(expected=E, ImageNet=I, CLIP=C, own=own, none=plain, DPN=expected_stats(families['DPN']), satellite=expected_stats(families['satellite']),
        **{'expected twice': E.then(E), 'ImageNet twice': I.then(I), 'expected, then ImageNet': E.then(I), 'ImageNet, then expected': I.then(E)},
        **{f'{k} on 0-255': scale(c, 1/255) for k, c in (('expected', E), ('ImageNet', I), ('none', plain))}, **{f'{k}, /255 twice': scale(c, 255) for k, c in (('expected', E), ('ImageNet', I), ('none', plain))},
        **{'ImageNet in BGR': scale((I.mean[::-1], I.std[::-1]), 1), 'half the std': (E.mean, (.25,)*3), 'twice the std': (E.mean, (1.,)*3), 'mean 0.3': ((.3,)*3, E.std), 'mean 0.7': ((.7,)*3, E.std), 'mean 0.3, 0.5, 0.7': ((.3, .5, .7), E.std)})
    @torch.no_grad()
    def answers(c): return torch.cat([m(norm(c)(b.float()/255)).argmax(1) for b in px.split(50)])
    ref, res = answers(E), {}
    for k, c in cases.items():
        a = answers(c)
        res[k] = dict(top1=(a == y).float().mean().item(), changed=(a != ref).float().mean().item(), harm=_harm(E, c))
        print(f'{k:26} top-1 {res[k]["top1"]:.3f}  changed {res[k]["changed"]:.3f}  harm {res[k]["harm"]:.3f}', flush=True)
    top1, changed, harm = ([r[k] for r in res.values()] for k in ('top1', 'changed', 'harm'))
    rank = {k: -spearmanr(top1, v).statistic for k, v in (('harm', harm), ('changed', changed))}
    print(f'\nSpearman rank correlation with the loss of top-1, {len(res)} pipelines, {len(y)} images: harm {rank["harm"]:.3f}, share of changed answers {rank["changed"]:.3f}')
    print(f'Red minus blue, mean and std over images: {colour}')
    return dict(images=len(y), red_minus_blue=colour, rank_correlation=rank, pipelines=res)


if __name__ == '__main__': main()
