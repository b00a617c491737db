"""Forward gradients in a federation on one page, with the digests of ``fs-fwdllm run`` (``fwdllm.robust.clip none``).

Clients look along seeded directions and stay where they are; the slopes of all of them estimate one gradient, and the
server steps on it: python examples/forward_gradient_on_a_page.py FILE [key value ...]
"""

import sys

import numpy as np

from fs_fwdllm.config import load_config
from fs_fwdllm.core.direction import direction_seed, make_distribution
from fs_fwdllm.core.replay import Contributions, Replayer, add_contributions
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data import client_batches, load_federated_data
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.objective import Objective


def federated_forward_gradients(config):
    """Yield the digest of the server's parameters: before the first round, and after each."""
    tokenizer, own, rate = load_tokenizer(config), config.fwdllm, config.train.optimizer.lr
    data = load_federated_data(config, tokenizer)
    model = load_model(config, tokenizer, data.label_names).model
    theta, signs = Trainables.of_model(model), make_distribution(own.direction)
    objective, replayer = Objective(model, theta, data.task), Replayer(theta, config.seed, signs)
    radius, pad = float(np.float32(own.radius)), tokenizer.pad_token_id
    cut = {"steps": config.train.local_update_steps, "batch_size": config.dataloader.batch_size, "seed": config.seed}

    def slope(batch_loss, seed):
        losses = []
        for side in (radius, -radius):
            point = theta.copy_values()
            add_contributions(point, Contributions([seed], np.float32([side])), config.seed, signs)
            losses.append(float(batch_loss.at(point).detach()))
        return np.float32((losses[0] - losses[1]) / (2 * radius))

    yield theta.digest()
    for number in range(config.federate.total_round_num):
        seeds, slopes, samples = {}, {}, {}
        for client, held in sorted(data.clients.items()):
            batches = client_batches(held.train, client=client, round_index=number, pad_token_id=pad, **cut)
            probes = [(index, probe) for index in range(len(batches)) for probe in range(own.probes)]
            seeds[client] = [direction_seed(number, client, index, probe) for index, probe in probes]
            looks = zip(probes, seeds[client], strict=True)
            slopes[client] = np.float64([slope(objective.on(batches[index]), seed) for (index, _), seed in looks])
            samples[client] = sum(map(len, batches))
        share = {client: count / sum(samples.values()) for client, count in samples.items()}
        coefficients = [-rate * share[client] / len(found) * found for client, found in slopes.items()]
        estimate = Contributions(
            [seed for looked in seeds.values() for seed in looked], np.float32(np.concatenate(coefficients))
        )
        replayer.apply(estimate, decay=1.0, momentum=0.0, rate=0.0)
        yield theta.digest()


if __name__ == "__main__":
    for digest in federated_forward_gradients(load_config(sys.argv[1], sys.argv[2:])):
        print(digest.hex())
