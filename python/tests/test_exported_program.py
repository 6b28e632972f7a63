"""The model code that `routegrad export` writes next to the weights behaves like transformers' own models.

Needs the program, from ROUTEGRAD_BIN or target/release. Does not build it.
"""

import os
import pathlib
import subprocess

import pytest
import torch

transformers = pytest.importorskip("transformers")

BUILT = pathlib.Path(__file__).resolve().parents[2] / "target/release/routegrad"
PROGRAM = pathlib.Path(os.environ.get("ROUTEGRAD_BIN", BUILT))
pytestmark = pytest.mark.skipif(not PROGRAM.is_file(), reason=f"no routegrad program: set ROUTEGRAD_BIN, or build {BUILT}")
SETTINGS = [
    "model.hidden=32",
    "model.layers=2",
    "model.heads=2",
    "model.sequence_length=32",
    "train.sequences_per_step=4",
    "train.micro_batch=4",
    "train.eval_sequences=4",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    train = [PROGRAM, "train", *sets, "--steps", "3", "--router", "default", "--quiet", "--out", folder / "run"]
    subprocess.run(train, check=True, capture_output=True)
    export = [PROGRAM, "export", "--model", folder / "run", "--to", "hf", "--out", folder / "hf"]
    subprocess.run(export, check=True, capture_output=True)
    found = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True)
    return found.float().eval()


@pytest.fixture
def batch():
    tokens = torch.randint(3, 250, (3, 16), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, :4] = -100
    return tokens, labels


def test_losses_of_micro_batches_add_up_to_the_loss_of_the_batch(model, batch):
    tokens, labels = batch
    whole = model(tokens, labels=labels).loss
    count = (labels[:, 1:] != -100).sum()
    parts = [model(tokens[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(3)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=0)


def test_gradient_checkpointing_does_not_change_gradients(model, batch):
    tokens, labels = batch

    def gradients():
        model.zero_grad()
        model(tokens, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    model.gradient_checkpointing_disable()
    model.eval()
    assert len(plain) == len(checkpointed) > 0
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_tuples_hidden_states_and_embeddings(model, batch):
    tokens, labels = batch
    output = model(tokens, labels=labels, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    loss, logits, _ = model(tokens, labels=labels, output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    embedded = model(inputs_embeds=model.get_input_embeddings()(tokens))
    torch.testing.assert_close(embedded.logits, output.logits)


@pytest.mark.parametrize("argument", [{"output_attentions": True}, {"past_key_values": object()}, {"unknown": 1}])
def test_an_unsupported_argument_raises(model, batch, argument):
    with pytest.raises(TypeError, match=next(iter(argument))):
        model(batch[0], **argument)
