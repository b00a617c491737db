#!/usr/bin/env bash
# Sourced by the scripts beside it: the published program's arguments, in the terms of a configuration.
#
#   --clients N             clients                                   (published --num_clients)
#   --cycles R              passes over the clients; N x R rounds     (--bcd_epochs)
#   --switch-mode MODE      ascending, descending, random, rotating, fixed, full, aggregate (two clients a block)
#                           (--switch_mode; agg is aggregate)
#   --switch-every K        optimiser steps a visit, instead of epochs (--switch_block_every; "never" is --switch-mode fixed)
#   --compress P            share of the other layers a client is sent; the rest are skipped  (--compress)
#   --model M, --data-root D, and any KEY VALUE of the configuration after --
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

# run_cybgd CONFIG CLIENTS CYCLES ARGUMENTS...
run_cybgd() {
    local config="$1" clients="$2" cycles="$3" given=()
    shift 3
    while (($#)); do
        case "$1" in
            --clients) clients="$2" ;;
            --cycles) cycles="$2" ;;
            --switch-mode)
                given+=(fwdllm.blocks.schedule "$2")
                if [[ "$2" == aggregate ]]; then given+=(fwdllm.blocks.clients_per_block 2); fi
                ;;
            --switch-every) given+=(train.batch_or_epoch batch train.local_update_steps "$2") ;;
            --compress) given+=(fwdllm.blocks.download.drop_ratio "$(awk -v kept="$2" 'BEGIN { print 1 - kept }')") ;;
            --model) given+=(model.type "$2") ;;
            --data-root) given+=(data.root "$2") ;;
            --)
                shift
                given+=("$@")
                break
                ;;
            *)
                echo "error: $1 is not known; see scripts/cybgd/run.sh" >&2
                return 2
                ;;
        esac
        if (($# < 2)); then
            echo "error: $1 needs a value" >&2
            return 2
        fi
        shift 2
    done
    ensure_environment demo "$all_extras"
    cd "$project_root"
    exec "$environment/bin/fs-fwdllm" run --cfg "cybgd/$config" federate.client_num "$clients" \
        federate.total_round_num "$((clients * cycles))" "${given[@]}"
}
