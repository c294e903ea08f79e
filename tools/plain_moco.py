"""MoCo as plain scripts write it, from the paper: what tools/bench.py compares moco_cifar.py with.

PIL transforms image by image in a DataLoader, float32, NCHW, a loop over the parameters for the
momentum update, .item() at each step.
"""

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image  # torchvision brings it
from torch import nn


class PlainSplitNorm(nn.BatchNorm2d):
    """Batch norm in `splits` groups of the batch, in one call: groups become channels. A group is
    every splits-th image here; which images form a group does not matter.
    """

    def __init__(self, channels, splits):
        super().__init__(channels)
        self.splits = splits

    def forward(self, x):  # in training
        s, (n, c, h, w) = self.splits, x.shape
        state = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, var, weight, bias = (vector.repeat(s) for vector in state)
        x = x.reshape(n // s, s * c, h, w)
        x = F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps)
        self.running_mean.copy_(mean.view(s, c).mean(0))
        self.running_var.copy_(var.view(s, c).mean(0))
        return x.view(n, c, h, w)


class Baseline:
    """MoCo, asymmetric, with a linear head, on the script's settings; float32 and NCHW"""

    def __init__(self, script, config, device):
        def build():
            norm = lambda channels: PlainSplitNorm(channels, config.bn_splits)
            backbone = script.build_encoder(config.arch, config.width, norm)
            return nn.Sequential(backbone, nn.Linear(backbone.dim, config.dim)).to(device)

        self.config, self.device, self.encoder_q, self.encoder_k = config, device, build(), build()
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters()):
            param_k.data.copy_(param_q.data)
            param_k.requires_grad = False
        self.queue = F.normalize(torch.randn(config.dim, config.queue_size, device=device), dim=0)
        sgd = dict(momentum=config.sgd_momentum, weight_decay=config.weight_decay)
        self.optimizer = torch.optim.SGD(self.encoder_q.parameters(), config.lr, **sgd)
        self.pointer = 0

    def update_keys(self):
        m = self.config.key_momentum
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters()):
            param_k.data = param_k.data * m + param_q.data * (1 - m)

    def loss(self, im_q, im_k):
        """-> loss, keys (N, C)"""
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            shuffle = torch.randperm(len(im_k)).to(self.device)
            k = F.normalize(self.encoder_k(im_k[shuffle]), dim=1)[torch.argsort(shuffle)]
        positive = torch.einsum("nc,nc->n", [q, k])[:, None]
        logits = torch.cat([positive, q @ self.queue], dim=1) / self.config.temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long).to(self.device)), k

    def step(self, im_q, im_k):
        self.update_keys()
        loss, keys = self.loss(im_q, im_k)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        slots = (self.pointer + torch.arange(len(keys))) % self.queue.shape[1]
        self.queue[:, slots.to(self.device)] = keys.T
        self.pointer = (self.pointer + len(keys)) % self.queue.shape[1]
        return loss.item()


class Pairs(torch.utils.data.Dataset):
    """Two views of each image (N, H, W, 3) uint8; and, for its loader, lists of random indices"""

    def __init__(self, images, config):
        self.images, self.batch_size, self.batches = images, config.batch_size, 1
        crop = T.RandomResizedCrop(config.image_size, config.crop_scale)
        jitter = T.RandomApply([T.ColorJitter(*config.jitter)], p=0.8)
        steps = crop, T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(config.gray)
        self.transform = T.Compose([*steps, T.ToTensor(), T.Normalize(config.mean, config.std)])

    def __getitem__(self, i):
        image = Image.fromarray(self.images[i])
        return self.transform(image), self.transform(image)

    def __iter__(self):
        for _ in range(self.batches):
            yield torch.randint(len(self.images), (self.batch_size,)).tolist()
