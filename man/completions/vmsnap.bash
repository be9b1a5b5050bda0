# bash completion for vmsnap(1).
#
# Commands and options come from vmsnap's own --help, so there is no list here
# that could be out of date; ids of snapshots come from `vmsnap list`.

# The subcommands, one a line.
_vmsnap_commands() {
  "$1" --help 2>/dev/null | sed -n '/^Subcommands:/,$s/^  \([a-z][a-z-]*\) .*/\1/p'
}

# The lines of `vmsnap COMMAND --help` that describe options: "  -o,--output FILE ...".
_vmsnap_options() {
  "$1" ${2:+"$2"} --help 2>/dev/null | sed -n 's/^  \(-[^ ].*\)/\1/p'
}

# The argument of option $2 as --help names it (FILE, N, ...), empty for a flag.
# $1 are the lines of _vmsnap_options: one space stands before an argument, more
# before a description; "N:INT in [1 - 256]" is an N, "Needs: --pid" is none.
_vmsnap_argument() {
  local line names argument
  while IFS= read -r line; do
    names=${line%% *}
    [[ ",$names," == *",$2,"* ]] || continue
    argument=${line#"$names "}
    argument=${argument%% *}
    [[ $argument == *: ]] || printf '%s\n' "${argument%%:*}"
    return
  done <<<"$1"
}

_vmsnap() {
  local program=$1 word=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
  local command='' store='' options argument i
  COMPREPLY=()

  # bash splits --store=DIR into three words.
  if [[ $word == = ]]; then
    word=''
  elif [[ $previous == = ]]; then
    previous=${COMP_WORDS[COMP_CWORD - 2]}
  fi
  for ((i = 1; i < COMP_CWORD; i++)); do
    case ${COMP_WORDS[i]} in
      --) COMPREPLY=($(compgen -f -- "$word")); return ;;  # QEMU's arguments
      --store)
        store=${COMP_WORDS[i + 1]}
        [[ $store != = ]] || store=${COMP_WORDS[i + 2]}
        ;;
      -*) ;;
      *) [[ -n $command ]] || command=${COMP_WORDS[i]} ;;
    esac
  done

  options=$(_vmsnap_options "$program" "$command")
  if [[ $word != -* && $previous == -* ]]; then
    argument=$(_vmsnap_argument "$options" "$previous")
    case $argument in
      '') ;;
      DOMAIN) COMPREPLY=($(compgen -W "$(virsh -q list --name 2>/dev/null)" -- "$word")); return ;;
      N | SECONDS | PID | START-END | URI | DURATION | TAG | NAME | COMMAND | SIZE | PERCENT) return ;;
      none) COMPREPLY=($(compgen -W none -- "$word")); return ;;
      'none|working-set|all')
        COMPREPLY=($(compgen -W 'none working-set all' -- "$word")); return ;;
      'keep|split') COMPREPLY=($(compgen -W 'keep split' -- "$word")); return ;;
      *) COMPREPLY=($(compgen -f -- "$word")); compopt -o filenames 2>/dev/null; return ;;
    esac
  fi

  if [[ $word == -* ]]; then
    COMPREPLY=($(compgen -W "$(printf '%s\n' "$options" | sed 's/ .*//' | tr , '\n' | grep '^--')" \
      -- "$word"))
  elif [[ -z $command ]]; then
    COMPREPLY=($(compgen -W "$(_vmsnap_commands "$program")" -- "$word"))
  elif [[ -n $store ]]; then
    # The directory as typed: ~ and quotes are still to be taken away.
    store=${store/#\~\//$HOME/}
    store=${store//[\"\'\\]/}
    COMPREPLY=($(compgen -W "$("$program" list --store "$store" --quiet 2>/dev/null)" -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
    compopt -o filenames 2>/dev/null
  fi
}

complete -F _vmsnap vmsnap
