# bash completion for jobctl. Words only: no process is started. A test holds it to the options that jobctl has.

_jobctl() {
    local cur prev words cword
    if declare -F _init_completion >/dev/null; then
        _init_completion || return
    else
        cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} words=("${COMP_WORDS[@]}") cword=$COMP_CWORD
    fi
    COMPREPLY=()

    local verb="" at=0 i
    for ((i = 1; i < cword; i++)); do
        case ${words[i]} in
            --socket) ((i++)) ;;
            -*) ;;
            *)
                verb=${words[i]} at=$i
                break
                ;;
        esac
    done

    case $prev in
        --socket | -o | --output)
            COMPREPLY=($(compgen -f -- "$cur"))
            return
            ;;
        --state)
            COMPREPLY=($(compgen -W "running queued paused cancelled completed expired failed" -- "$cur"))
            return
            ;;
        --priority)
            COMPREPLY=($(compgen -W "high normal low" -- "$cur"))
            return
            ;;
        --tenant)
            COMPREPLY=($(compgen -u -- "$cur"))
            return
            ;;
        -m | --message | --name | --handler | --param | --begin | --deadline | --failures-max | --submit-id | \
            --limit | --changed-since | --since | --job | --timeout)
            return
            ;;
    esac

    local options="--json --socket --help" arguments=""
    case $verb in
        "")
            options+=" --version"
            arguments="submit wait watch output errors status list ls show log events cancel pause resume retry
                priority first rm queue handlers tenants device ping completion"
            ;;
        submit)
            options+=" --priority --tenant --name --param --begin --deadline --failures-max --wait --dry-run --no-check
                --submit-id"
            if [[ $cur != -* && $cword -gt $((at + 1)) ]]; then
                COMPREPLY=($(compgen -f -- "$cur"))
                return
            fi
            ;;
        wait) options+=" --timeout" arguments="@" ;;
        watch | show) arguments="@" ;;
        output) options+=" --output" arguments="@" ;;
        errors) options+=" --output --summary" arguments="@" ;;
        list | ls) options+=" --state --tenant --handler --mine --all --newest --limit --changed-since" ;;
        log) options+=" --follow" arguments="@" ;;
        events) options+=" --follow --since --job" ;;
        cancel | pause | resume | first | rm) options+=" --message" arguments="@" ;;
        retry) options+=" --failed-items --message" arguments="@" ;;
        priority) options+=" --message" arguments="@ high normal low" ;;
        queue) options+=" --message" arguments="stop start disable enable drain" ;;
        completion) arguments="bash zsh fish" ;;
    esac
    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$cur"))
    else
        COMPREPLY=($(compgen -W "$arguments" -- "$cur"))
    fi
}
complete -o filenames -F _jobctl jobctl
