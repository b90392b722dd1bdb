"""A hand-written training loop in plain PyTorch, for one network on one GPU. gpu_suite.py compares with it.

It has no log, totals, schedule, checkpoints or resume: pixels that lie on the device, horizontal flips, the compiled
network, fused Adam, and one CUDA graph around all of it. On a CPU it runs without the graph.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from cifar_dist import models


class Floor:
    """Trains `name` on random pixels; each call is one step on other images."""

    def __init__(self, name: str, *, batch_size: int, image_size: int, finetune: bool, device: torch.device) -> None:
        self.batch_size, self.image_size, self.device = batch_size, image_size, device
        random = torch.Generator().manual_seed(0)
        num_images = max(4096, batch_size)
        self.pixels = torch.randint(0, 256, (num_images, 32, 32, 3), dtype=torch.uint8, generator=random).to(device)
        self.all_labels = torch.randint(10, (num_images,), generator=random).to(device)
        self.rows = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.model = models.build(name, finetune=finetune).to(device).to(memory_format=torch.channels_last)
        self.base, self.trained = None, self.model
        if models.MODELS[name].has_base and not finetune:
            base = self.model.base.eval().requires_grad_(False)
            base.to(torch.bfloat16)
            self.base, self.trained = self.compiled(base), Head(self.model)
        self.trained.train()
        self.network = self.compiled(self.trained)
        parameters = [p for p in self.trained.parameters() if p.requires_grad]
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.Adam(parameters, 1e-3, eps=1e-7, fused=True, capturable=on_gpu)
        self.run = self.captured() if on_gpu else self.step

    def compiled(self, network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return torch.compile(network, dynamic=False) if self.device.type == "cuda" else network

    def images(self) -> torch.Tensor:
        images = self.pixels[self.rows].permute(0, 3, 1, 2).float() / 127.5 - 1
        flip = torch.rand(self.batch_size, device=self.device) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
        if self.image_size != images.shape[-1]:
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bilinear")
        return images.contiguous(memory_format=torch.channels_last)

    def step(self) -> None:
        inputs = self.images()
        if self.base is not None:
            with torch.no_grad():
                inputs = self.base(inputs.bfloat16())
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.network(inputs)
        F.cross_entropy(logits.float(), self.all_labels[self.rows]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def captured(self) -> Callable[[], None]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.step()
        return graph.replay

    def __call__(self) -> None:
        self.rows.copy_(torch.randint(len(self.pixels), (self.batch_size,)))
        self.run()


class Head(nn.Module):
    """What follows ResNet50V2's base."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([model.conv, model.activation, model.pool, model.classifier])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x
