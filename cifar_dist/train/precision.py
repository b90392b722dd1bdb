"""Mixed precision: which type, autocast and the gradient scaler."""

import torch


class Precision:
    """The resolved precision of a run on a device: fp32, bf16 or fp16.

    auto is bf16 on a GPU that has it and fp16 on an older one; on a CPU bf16 where it has instructions for it (AMX,
    AVX-512 BF16), else fp32. Without AMX bf16 may be slower (docs/performance.md). fp16 scales the loss, others do not
    need it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "auto":
            if device.type == "cuda":
                name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
            else:
                has = torch.cpu.get_capabilities()
                name = "bf16" if has.get("amx_bf16") or has.get("avx512_bf16") else "fp32"
        self.name, self.device = name, device
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.name != "fp32")
