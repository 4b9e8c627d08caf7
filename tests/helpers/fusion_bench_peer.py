"""FusionBench's programs for one model at a time, driven with plain tensors; skips the test where they are missing."""

import sys
from types import SimpleNamespace

import pytest
import torch


def load(name, module):
    """A class of FusionBench, of which some import what newer versions of transformers do not have."""
    clip = pytest.importorskip("transformers.models.clip.modeling_clip")
    pytest.importorskip("fusion_bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "CLIPVisionTransformer", type("Gone", (), {}), raising=False)
        return getattr(pytest.importorskip(module, exc_type=ImportError), name)


def opcm(vectors, alpha):
    """Its merging of single tensors, with the norms that its `run` keeps."""
    peer = load("OPCMForCLIP", "fusion_bench.method.opcm.opcm")
    program = peer.__new__(peer)
    program.previous_lambda_t, merged = 1.0, dict(vectors[0])

    def norm(vector):
        return float(torch.cat([tensor.flatten() for tensor in vector.values()]).norm())

    norms = [norm(vectors[0])]
    for vector in vectors[1:]:
        norms.append(norm(vector))
        program.lambda_t = 1
        for key, tensor in vector.items():
            base = torch.zeros_like(tensor)
            if tensor.ndim == 2:
                merged[key] = program.merge_linear_weights(merged[key], base, tensor, param_name=key, alpha=alpha)
            else:
                merged[key] = program.merge_other_parameters(merged[key], base, tensor, param_name=key)
        now, mean = norm(merged), sum(norms) / len(norms)
        merged = {key: tensor * (mean / now) for key, tensor in merged.items()}
        program.previous_lambda_t = now / mean
    return merged


def doge(vectors, scale, density, subspace, steps=400):
    """Its steps for matrices, in the order of its `run`."""
    peer = load("DOGE_TA_Algorithm", "fusion_bench.method.doge_ta.doge_ta")

    class Driven(peer):
        fabric = SimpleNamespace(device=torch.device("cpu"), backward=lambda loss: loss.backward())
        config = SimpleNamespace(lamda=scale, K=density, subspace=subspace)

    program = Driven.__new__(Driven)
    program.delta = None
    program.lamdas = program.compute_layer_lamdas(vectors)
    program.projection = {}
    for key in vectors[0]:
        found = [torch.linalg.svd(vector[key], full_matrices=False) for vector in vectors]
        share = int(len(found[0].S) / len(vectors))
        U = torch.linalg.svd(torch.cat([f.U[:, :share] for f in found], 1), full_matrices=False).U
        shared = U[:, : int(len(found[0].S) / subspace)]
        program.projection[key] = shared @ shared.T
    with pytest.MonkeyPatch.context() as patch:  # the number of steps is written into it
        patch.setattr(sys.modules[peer.__module__], "range", lambda *bounds: range(steps), raising=False)
        program.optimize_delta(vectors)
    delta = {key: tensor.detach() for key, tensor in program.delta.items()}
    flat = [program.state_dict_to_vector(vector) for vector in vectors]
    masks = [program.topk_values_mask(each, K=density) for each in flat]
    whole = program.state_dict_to_vector(delta)
    total = {key: torch.zeros_like(tensor) for key, tensor in delta.items()}
    for each, mask, factor in zip(flat, masks, program.lamdas, strict=True):
        like = {key: tensor.clone() for key, tensor in delta.items()}
        adjusted = program.vector_to_state_dict((each + whole) * mask, like)
        for key in total:
            total[key] += factor[key] * adjusted[key]
    return total
