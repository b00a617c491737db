#!/usr/bin/env bash
# Sourced by the scripts beside it: runs of FwdLLM's experiments, and pictures of several of them.
#
# Every script takes, after its own arguments, any KEY VALUE of the configuration, e.g. data.root ../ag_news.
# FwdLLM's own data and partition files are the default; text files do as well:
#   data.root ../shared/data/ag_news data.type train_10k.jsonl@text fwdllm.data.test_file test_desc.jsonl \
#   fwdllm.data.partition "" fwdllm.data.partition_method "" federate.client_num 100
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

# usage_unless TEXT CONDITION: with CONDITION false, say how a script is called and end.
usage_unless() {
    if ! (($2)); then
        echo "usage: $0 $1" >&2
        exit 2
    fi
}

# prepare: the environment (h5 files need the extra data, which dev has), and the project's folder as the current one.
prepare() {
    ensure_environment data,demo "$all_extras"
    cd "$project_root"
}

# published_keys LR ALG: sets $config and $keys to what the published program does for an algorithm.
published_keys() {
    keys=(train.optimizer.lr "$1")
    case "$2" in
        FedFwd) config=agnews_published ;;
        FedAvg) config=agnews_published_backprop ;;
        FedSgd)
            config=agnews_published_backprop
            keys+=(federate.method FedSGD train.batch_or_epoch batch)
            ;;
        *)
            echo "error: ALG $2 is not known; allowed are FedFwd, FedAvg, FedSgd" >&2
            exit 2
            ;;
    esac
}

# train CONFIG KEY VALUE ...
train() {
    local config="$1"
    shift
    "$environment/bin/fs-fwdllm" run --cfg "fwdllm/$config" "$@"
}

# ablate NAME, with the variants in the array $variants ("NAME KEY VALUE KEY VALUE ..."), and KEY VALUE ... for all:
# one run a variant, in a folder of its own for every call, then a picture of all. What a variant says, and where its run
# goes, cannot be overridden.
ablate() {
    local name="$1" outdir runs=() variant words
    shift
    outdir="runs/fwdllm/$name-$(date +%Y%m%d-%H%M%S)"
    for variant in "${variants[@]}"; do
        read -r -a words <<<"$variant"
        train agnews_published "$@" outdir "$outdir" expname "${words[0]}" "${words[@]:1}"
        runs+=("$outdir/${words[0]}")
    done
    "$environment/bin/fs-fwdllm" compare "${runs[@]}" --output "$outdir/comparison.png"
}
