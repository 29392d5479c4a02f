"""A loop with Hugging Face's accelerate: python accelerate_loop.py, or accelerate launch."""

from itertools import islice

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import Said, arguments, images, network, scheduler

import fastdiff  # fastdiff


def main() -> None:
    args = arguments()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model, noise_scheduler, said = network(), scheduler(), Said()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if not args.plain:
        fastdiff.patch(model, noise_scheduler)  # fastdiff
    model, optimizer, loader = accelerator.prepare(model, optimizer, images(args.batch))
    model.train()
    set_seed(1)
    for (clean,) in islice(loader, args.steps):
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, clean.shape[:1], device=clean.device)
        noisy = noise_scheduler.add_noise(clean, noise, t)
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(noisy, t).sample, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        said(accelerator.gather(loss.detach()).mean())
    said.finish()


if __name__ == "__main__":
    main()
