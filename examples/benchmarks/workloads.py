"""The workloads of the benchmarks by name: ``WORKLOADS`` lists each in its full and in its quick size.

The models are in ``networks.py`` (P1 to P3, and ``fc``), ``reaction_diffusion.py`` (P4), ``transformer.py`` and
``vae.py`` (P5); what every workload has to say is in ``workload.py``.
"""

from __future__ import annotations

from examples.benchmarks.networks import BayesianConvNet, BayesianDenseNet, BayesianIRNN, BayesianMLP
from examples.benchmarks.reaction_diffusion import ReactionDiffusion
from examples.benchmarks.transformer import BayesianTransformer
from examples.benchmarks.vae import ConvolutionalVAE
from examples.benchmarks.workload import Workload

# name on the command line -> (full size, quick size)
WORKLOADS: dict[str, tuple[Workload, Workload]] = {
    "p1": (
        BayesianMLP(
            name="p1",
            title="24 x 512 GELU Bayesian neural network, batch 4096",
            depth=24,
            width=512,
            inputs=512,
            batch=4096,
            data_size=16384,
            micro_batches=16,
            training_steps=30,
            draws=32,
            repeats=10,
        ),
        BayesianMLP(
            name="p1-quick",
            title="4 x 64 GELU Bayesian neural network, batch 256",
            depth=4,
            width=64,
            inputs=64,
            batch=256,
            data_size=1024,
            micro_batches=4,
            training_steps=100,
            draws=256,
            repeats=30,
        ),
    ),
    "p2": (
        BayesianIRNN(
            name="p2",
            title="Bayesian IRNN, 784 steps, 100 units, batch 150",
            batch=150,
            micro_batches=15,
            training_steps=30,
            draws=32,
            repeats=10,
        ),
        BayesianIRNN(
            name="p2-quick",
            title="Bayesian IRNN, 64 steps, 16 units, batch 32",
            side=8,
            units=16,
            batch=32,
            micro_batches=4,
            training_steps=100,
            draws=256,
            repeats=30,
        ),
    ),
    "p3": (
        BayesianConvNet(
            name="p3",
            title="Bayesian ConvNet 3-16-32-32-32, 5 x 5, batch 150",
            batch=150,
            micro_batches=15,
            training_steps=30,
            draws=32,
            repeats=10,
        ),
        BayesianConvNet(
            name="p3-quick",
            title="Bayesian ConvNet 3-4-8, 5 x 5, on 8 x 8 images, batch 32",
            side=8,
            channels=(4, 8),
            data_size=1024,
            batch=32,
            micro_batches=4,
            training_steps=100,
            draws=256,
            repeats=30,
        ),
    ),
    "p4": (
        ReactionDiffusion(
            name="p4",
            title="Reaction-diffusion control, 33 x 33 grid, 40960 steps",
            side=33,
            steps=40960,
            training_steps=10,
            draws=16,
            repeats=5,
        ),
        ReactionDiffusion(
            name="p4-quick",
            title="Reaction-diffusion control, 9 x 9 grid, 256 steps",
            side=9,
            steps=256,
            training_steps=30,
            draws=256,
            repeats=30,
        ),
    ),
    "p5": (
        BayesianTransformer(
            name="p5",
            title="4-block Bayesian Transformer, width 128, 128 tokens, batch 32",
            batch=32,
            micro_batches=8,
            training_steps=30,
            draws=32,
            repeats=10,
        ),
        BayesianTransformer(
            name="p5-quick",
            title="2-block Bayesian Transformer, width 16, 16 tokens, batch 16",
            depth=2,
            width=16,
            heads=2,
            tokens=16,
            vocabulary=16,
            data_size=1024,
            batch=16,
            micro_batches=4,
            training_steps=100,
            draws=256,
            repeats=30,
        ),
    ),
    "p5vae": (
        ConvolutionalVAE(
            name="p5vae",
            title="Convolutional VAE, 32 and 64 channels, batch 128",
            batch=128,
            micro_batches=1,
            training_steps=30,
            draws=32,
            repeats=10,
        ),
        ConvolutionalVAE(
            name="p5vae-quick",
            title="Convolutional VAE, 4 and 8 channels, on 8 x 8 images, batch 32",
            side=8,
            channels=(4, 8),
            latents=4,
            batch=32,
            micro_batches=1,
            training_steps=100,
            draws=256,
            repeats=30,
        ),
    ),
    "fc": (
        BayesianDenseNet(
            name="fc",
            title="Fully connected network 784-300-300-300-10, batch 150",
            batch=150,
            micro_batches=15,
            training_steps=30,
            draws=32,
            repeats=10,
        ),
        BayesianDenseNet(
            name="fc-quick",
            title="Fully connected network 64-64-64-10, batch 64",
            side=8,
            widths=(64, 64),
            batch=64,
            micro_batches=4,
            training_steps=100,
            draws=256,
            repeats=30,
        ),
    ),
}
