# Sourced by the other scripts: makes a virtual environment that has the package with the extras asked for.
#
# The environment is .venv in the project's root, or $FS_FWDLLM_VENV; after use_fedml_environment it is .venv-fedml, or
# $FS_FWDLLM_FEDML_VENV. It is made by $PYTHON, or by the first Python that is found and new and old enough. Nothing is
# installed again while setup.cfg, pyproject.toml and the constraints are what they were.

project_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
environment="${FS_FWDLLM_VENV:-$project_root/.venv}"
constraints="$project_root/constraints.txt"
newest_python=13
all_extras=demo,dev,docs,federatedscope,secure # those of this environment
replacements=() # packages put in the place of what was installed, without what they depend on

# From here on ensure_environment makes the environment for FedML, which needs older libraries than we do.
use_fedml_environment() {
    environment="${FS_FWDLLM_FEDML_VENV:-$project_root/.venv-fedml}"
    constraints="$project_root/constraints-fedml.txt"
    newest_python=11
    replacements=(torchvision==0.16.2 typer==0.29.1)
}

is_usable_python() {
    "$1" -c "import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $newest_python))" 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python python3.11 python3.12 python3.13 python3.10}; do
        if is_usable_python "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "needs Python 3.10 to 3.$newest_python with the modules venv and ensurepip; name one in PYTHON" >&2
    return 1
}

# ensure_environment EXTRAS [EXTRAS_THAT_ALSO_DO]
ensure_environment() {
    local extras="$1" wanted installed python
    wanted="$(cat "$project_root"/{setup.cfg,pyproject.toml} "$constraints" | cksum) $project_root"
    for installed in "$@"; do
        if [[ "$(cat "$environment/installed-$installed" 2>/dev/null)" == "$wanted" ]] &&
            "$environment/bin/fs-fwdllm" --version >/dev/null 2>&1; then
            echo "environment $environment is ready"
            return
        fi
    done
    if ! is_usable_python "$environment/bin/python"; then
        python="$(find_python)"
        echo "making the environment $environment with $("$python" --version)"
        "$python" -m venv --clear "$environment"
    fi
    echo "installing fs-fwdllm[$extras] into $environment (minutes, the first time)"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$constraints" --editable "$project_root[$extras]"
    if ((${#replacements[@]})); then
        # pip then complains that somebody wanted other versions, which is the purpose
        "$environment/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --no-deps "${replacements[@]}"
    fi
    echo "$wanted" >"$environment/installed-$extras"
}
