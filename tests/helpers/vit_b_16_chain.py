"""The whole chain on the full ViT-B/16 visual tower, two users; prints what it saw as JSON. Run in its own process."""

import copy
import json
import resource

import open_clip
import torch
from torch import nn

from rmtllmf.channel import UplinkScenario, sic, transmit, worst_case_covariance
from rmtllmf.metrics import accuracy, cosine_similarity, snr_db
from rmtllmf.resilience import attention_keys, embedding_keys, realign, resilient_fusion
from rmtllmf.taskvec import TaskVector


def main():
    torch.manual_seed(0)
    torch.set_num_threads(2)
    config = open_clip.get_model_config("ViT-B-16")
    vision = config["vision_cfg"]
    base = open_clip.transformer.VisionTransformer(
        vision["image_size"], vision["patch_size"], vision["width"], vision["layers"], vision["width"] // 64, 4.0,
        output_dim=config["embed_dim"],
    )  # fmt: skip
    tasks = {
        name: (
            nn.Linear(config["embed_dim"], 2),
            [(torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(seed)), torch.tensor([0, 1]))],
        )
        for seed, name in enumerate(("one", "two"))
    }
    sent = []
    for name, task in tasks.items():
        tuned = copy.deepcopy(base)
        realign(tuned, {name: task}, steps=1, warmup=0.0, lr=1e-4)
        sent.append(TaskVector.between(base, tuned))
        del tuned
    up = UplinkScenario(num_users=2).draw(seed=0)
    C = worst_case_covariance(up.H, up.P, 124 * up.noise, noise=up.noise) + up.noise_covariance
    rx = sic(up.H, up.P, C, designed_for=up.noise_covariance, order="strongest_first")
    heard = transmit(sent, rx, seed=0)
    snr = [snr_db(a, b) for a, b in zip(sent, heard, strict=True)]
    similarity = cosine_similarity(heard).tolist()
    frozen = embedding_keys(base)
    before = {key: value.clone() for key, value in base.state_dict().items() if key in frozen}
    model = copy.deepcopy(base)
    result = resilient_fusion(model, base, heard, tasks, steps=1, warmup=0.0)
    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in model.parameters()),
                "mse": rx.mse.tolist(),
                "snr": snr,
                "similarity": similarity,
                "embeddings": list(frozen),
                "embeddings_are_the_base's": all(torch.equal(model.state_dict()[k], before[k]) for k in frozen),
                "attention_changed": not any(
                    torch.equal(model.state_dict()[k], base.state_dict()[k]) for k in attention_keys(base)
                ),
                "losses": result.losses,
                "accuracy": [accuracy(model, batches, head=head) for head, batches in tasks.values()],
                "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            }
        )
    )


if __name__ == "__main__":
    main()
