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
            --socket | --notify-socket) ((i++)) ;;
            -*) ;;
            *)
                verb=${words[i]} at=$i
                break
                ;;
        esac
    done

    case $prev in
        --socket | --notify-socket | -o | --output)
            COMPREPLY=($(compgen -f -- "$cur"))
            return
            ;;
        --state)
            if [[ $verb == notifications ]]; then
                COMPREPLY=($(compgen -W "pending delivered failed muted" -- "$cur"))
            else
                COMPREPLY=($(compgen -W "running queued paused cancelled completed expired failed" -- "$cur"))
            fi
            return
            ;;
        --notify-on)
            COMPREPLY=($(compgen -W "start finish fail pause stall progress=25%" -- "$cur"))
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
            --notify | --endpoint | --limit | --changed-since | --since | --job | --timeout)
            return
            ;;
    esac

    local options="--json --socket --help" arguments=""
    case $verb in
        "")
            options+=" --version"
            arguments="submit wait watch output errors status list ls show log events notifications cancel pause resume retry
                priority first rm queue handlers tenants device ping completion"
            ;;
        submit)
            options+=" --priority --tenant --name --param --begin --deadline --failures-max --wait --dry-run --no-check
                --submit-id --notify --notify-on"
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
        retry) options+=" --failed-items --message --notify --notify-on" arguments="@" ;;
        notifications)
            options+=" --all --state --job --endpoint --clear --notify --notify-on --notify-socket"
            arguments="@ list retry mute unmute defaults"
            ;;
        priority) options+=" --message" arguments="@ high normal low" ;;
        tenants) options+=" --watch" ;;
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
