"""A LightningModule and its Trainer."""

import lightning
import torch
import torch.nn.functional as F
from common import Said, arguments, images, network, scheduler

import fastdiff  # fastdiff


class Diffusion(lightning.LightningModule):
    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.model, self.noise_scheduler, self.said = network(), scheduler(), Said()
        if not plain:
            fastdiff.patch(self.model, self.noise_scheduler)  # fastdiff

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        clean = batch[0]
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, clean.shape[:1], device=clean.device)
        noisy = self.noise_scheduler.add_noise(clean, noise, t)
        loss = F.mse_loss(self.model(noisy, t).sample, noise)
        self.said(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def main() -> None:
    args = arguments()
    module = Diffusion(args.plain)
    lightning.seed_everything(1)
    trainer = lightning.Trainer(
        max_steps=args.steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, images(args.batch))
    module.said.finish()


if __name__ == "__main__":
    main()
