"""A plain loop, in the manner of diffusers' unconditional example."""

from itertools import islice

import torch
import torch.nn.functional as F
from common import Said, arguments, images, network, scheduler

import fastdiff  # fastdiff


def main() -> None:
    args = arguments()
    model, noise_scheduler, said = network(), scheduler(), Said()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if not args.plain:
        fastdiff.patch(model, noise_scheduler)  # fastdiff
    model.train()
    torch.manual_seed(1)
    for (clean,) in islice(images(args.batch), args.steps):
        noise = torch.randn_like(clean)
        t = torch.randint(0, noise_scheduler.config.num_train_timesteps, clean.shape[:1])
        noisy = noise_scheduler.add_noise(clean, noise, t)
        loss = F.mse_loss(model(noisy, t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        said(loss)
    said.finish()


if __name__ == "__main__":
    main()
