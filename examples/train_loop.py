"""S2FT in a plain PyTorch loop: teach a model one sentence, save the adapter, reload it onto a fresh base.

python examples/train_loop.py [MODEL]        MODEL: hub name or folder; default the embedded smollm2-135m
"""

import sys

import torch

from intaglio import S2FT, Delta, attach
from intaglio.hf.models import load_model, load_tokenizer

name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
model, tokenizer = load_model(name), load_tokenizer(name)
batch = tokenizer(
    "An intaglio is cut into the surface, not built on top of it.", return_tensors="pt", return_token_type_ids=False
)

tuner = attach(model, S2FT(o=0.25, down=0.03))
print(tuner.selection)
optimizer = tuner.optimizer(torch.optim.AdamW, lr=2e-3)
for step in range(5):
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {loss.item():.3f}")
folder = tuner.save("runs/train_loop")

fresh = load_model(name)
Delta.load(folder).apply_(fresh)
model.eval(), fresh.eval()
with torch.no_grad():
    same = torch.equal(model(**batch).logits, fresh(**batch).logits)
print(f"{folder}: reloaded, logits {'equal' if same else 'DIFFERENT'}")
