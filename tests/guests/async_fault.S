# A guest without an operating system that takes KVM's asynchronous page faults:
# while a page of one task is not there, it runs another.
#
#   as --64 --defsym START=0x1000000 --defsym END=0x4000000 -o o.o async_fault.S
#   ld -m elf_x86_64 -Ttext=0x7c00 --oformat binary -o rom.bin o.o
#   qemu-system-x86_64 -accel kvm -cpu host -bios rom.bin
#
# It is its own firmware: a real one has far more instructions that a KVM below
# another hypervisor must get right.
#
# The first task adds one to every page of START..END, in page order, for ever,
# and checks what is there: the page's number at both ends, the count of passes
# between. The second counts, on nothing but its own page. On COM1:
#   N  KVM does not offer asynchronous page faults; nothing follows
#   R  memory is filled          .  a pass without fault in it is done
#   [  KVM says that a page of the first task is not present; the second starts
#   w  the second has counted up once more
#   ]  KVM says that the page is there; the first goes on
#   !  a page was wrong          X  an exception that should not be
#
# Linux Documentation/virt/kvm/x86/msr.rst: MSR_KVM_ASYNC_PF_EN and its kin.

        .set    COM1, 0x3f8
        .set    LENGTH, 0x1800          # of what goes to RAM

        .set    IA32_APIC_BASE, 0x1b
        .set    IA32_EFER, 0xc0000080
        .set    X2APIC_EOI, 0x80b
        .set    X2APIC_SPURIOUS, 0x80f
        .set    ASYNC_PF_EN, 0x4b564d02
        .set    ASYNC_PF_INT, 0x4b564d06
        .set    ASYNC_PF_ACK, 0x4b564d07
        .set    ASYNC_PF_FEATURES, 1 << 4 | 1 << 14

        .set    PML4, 0x10000           # and a table of each level behind it
        .set    IDT, 0x13000
        .set    STACK_ONE, 0x15800      # of the kernel, for each task, in one page
        .set    STACK_TWO, 0x16000

        .set    KERNEL_CODE, 0x08
        .set    KERNEL_DATA, 0x10
        .set    USER_DATA, 0x18 | 3
        .set    USER_CODE, 0x20 | 3
        .set    TASK_STATE, 0x28

        .code16
        .globl  _start
_start:
        xorw    %ax, %ax
        movw    %ax, %ds
        movb    $0xff, %al              # no interrupts but those of the APIC
        outb    %al, $0x21
        outb    %al, $0xa1
        inb     $0x92, %al              # the A20 gate, should it be closed
        orb     $2, %al
        andb    $0xfe, %al              # bit 0 would reset the machine
        outb    %al, $0x92
        lgdt    gdt_pointer
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmp    $0x38, $protected

        .code32
protected:
        movw    $KERNEL_DATA, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss

        movl    $PML4, %edi             # the first GiB, for everybody
        xorl    %eax, %eax
        movl    $0x3000 / 4, %ecx
        rep stosl
        movl    $(PML4 + 0x1000 + 7), PML4
        movl    $(PML4 + 0x2000 + 7), PML4 + 0x1000
        movl    $PML4 + 0x2000, %edi
        movl    $0x87, %eax             # a page of 2 MiB
directory:
        movl    %eax, (%edi)
        addl    $0x200000, %eax
        addl    $8, %edi
        cmpl    $PML4 + 0x3000, %edi
        jb      directory

        movl    %cr4, %eax
        orl     $0x20, %eax             # physical address extension
        movl    %eax, %cr4
        movl    $PML4, %eax
        movl    %eax, %cr3
        movl    $IA32_EFER, %ecx
        rdmsr
        orl     $0x100, %eax            # long mode
        wrmsr
        movl    %cr0, %eax
        andl    $0x9fffffff, %eax       # caches on
        orl     $0x80000000, %eax       # and paging
        movl    %eax, %cr0
        ljmp    $KERNEL_CODE, $long

        .code64
long:
        movl    $STACK_ONE, %esp
        movl    $0x40000000, %eax
        cpuid
        cmpl    $0x4b4d564b, %ebx       # "KVMK"
        jne     none
        movl    $0x40000001, %eax
        cpuid
        andl    $ASYNC_PF_FEATURES, %eax
        cmpl    $ASYNC_PF_FEATURES, %eax
        jne     none

        movl    $IDT, %edi
        movl    $256, %ecx
gate:
        movl    $unexpected, %eax
        movl    $0x8e00, %edx
        call    set_gate
        loop    gate
        movl    $IDT + 14 * 16, %edi
        movl    $page_fault, %eax
        call    set_gate
        movl    $IDT + 6 * 16, %edi
        movl    $print, %eax
        call    set_gate
        movl    $IDT + 0x40 * 16, %edi
        movl    $page_ready, %eax
        call    set_gate
        lidt    idt_pointer
        movw    $TASK_STATE, %ax
        ltr     %ax

        movl    $IA32_APIC_BASE, %ecx
        rdmsr
        orl     $0xc00, %eax            # x2APIC
        wrmsr
        xorl    %edx, %edx
        movl    $X2APIC_SPURIOUS, %ecx
        movl    $0x1ff, %eax            # enabled
        wrmsr
        movl    $ASYNC_PF_INT, %ecx
        movl    $0x40, %eax
        wrmsr
        movl    $ASYNC_PF_EN, %ecx
        movl    $async_pf + 0xb, %eax   # enabled, always, page ready by interrupt
        wrmsr

        movl    $first_task, %eax
        jmp     start_task

none:
        movw    $COM1, %dx
        movb    $'N', %al
        outb    %al, %dx
halt:
        hlt
        jmp     halt

# rdi: the gate, which is moved on; eax: the handler; edx: type and privilege.
set_gate:
        movw    %ax, (%rdi)
        movw    $KERNEL_CODE, 2(%rdi)
        movw    %dx, 4(%rdi)
        movw    $0, 6(%rdi)             # the code lies below 64 KiB
        movq    $0, 8(%rdi)
        addq    $16, %rdi
        ret

# rax: where. Tasks use no stack and neither rbx nor rdx, which handlers change.
# Interrupts are on, as KVM wants it for an asynchronous page fault.
start_task:
        pushq   $USER_DATA
        pushq   $0
        pushq   $0x202
        pushq   $USER_CODE
        pushq   %rax
        iretq

unexpected:
        movw    $COM1, %dx
        movb    $'X', %al
        outb    %al, %dx
        jmp     halt

# What a task asks for by an undefined instruction. al: the character.
print:
        movw    $COM1, %dx
        outb    %al, %dx
        addq    $2, (%rsp)
        iretq

# The first task waits, on its own stack, until the page of its token is there.
page_fault:
        cmpl    $1, async_pf            # page not present, in the host
        jne     unexpected
        movl    $0, async_pf
        pushq   %rax
        pushq   %rcx
        movq    %cr2, %rax
        movl    %eax, waits_for
        movq    %rsp, waiting
        movl    $STACK_TWO, task_state + 4
        movw    $COM1, %dx
        movb    $'[', %al
        outb    %al, %dx
        movl    $second_task, %eax
        jmp     start_task

page_ready:
        pushq   %rax
        pushq   %rcx
        movl    async_pf + 4, %ebx
        movl    $0, async_pf + 4
        movl    $ASYNC_PF_ACK, %ecx
        movl    $1, %eax
        xorl    %edx, %edx
        wrmsr
        movl    $X2APIC_EOI, %ecx
        xorl    %eax, %eax
        wrmsr
        cmpq    $0, waiting
        je      go_on
        cmpl    $-1, %ebx               # all pages
        je      first_goes_on
        cmpl    waits_for, %ebx
        jne     go_on
first_goes_on:
        movw    $COM1, %dx
        movb    $']', %al
        outb    %al, %dx
        movl    $STACK_ONE, task_state + 4
        movq    waiting, %rsp
        movq    $0, waiting
        popq    %rcx
        popq    %rax
        addq    $8, %rsp                # the error code
        iretq
go_on:
        popq    %rcx
        popq    %rax
        iretq

        .balign 8
gdt:
        .quad   0
        .quad   0x00209a0000000000      # code, 64 bits
        .quad   0x00cf92000000ffff      # data
        .quad   0x00cff2000000ffff      # data of tasks
        .quad   0x0020fa0000000000      # code of tasks
        .quad   0x0000890000000067 | (task_state - _start + 0x7c00) << 16
        .quad   0
        .quad   0x00cf9a000000ffff      # code, 32 bits
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt
idt_pointer:
        .word   256 * 16 - 1
        .quad   IDT
task_state:
        .long   0
        .quad   STACK_ONE
        .fill   92, 1, 0

waiting:        .quad   0               # the first task's stack, if it waits
waits_for:      .long   0
        .balign 64
async_pf:       .fill   64, 1, 0        # struct kvm_vcpu_pv_apf_data

# Both tasks in one page, which is there as soon as one of them runs.
        .org    0x1400
first_task:
        movl    $START, %edi            # fill: edi is the page
fill:
        movl    %edi, (%rdi)
        movl    $0, 4(%rdi)
        movl    %edi, 4092(%rdi)
        addl    $4096, %edi
        cmpl    $END, %edi
        jb      fill
        movb    $'R', %al
        ud2
        xorl    %esi, %esi              # passes
pass:
        movl    $START, %edi
step:
        cmpl    %esi, 4(%rdi)
        jne     wrong
        cmpl    %edi, (%rdi)
        jne     wrong
        cmpl    %edi, 4092(%rdi)
        jne     wrong
        incl    4(%rdi)
        addl    $4096, %edi
        cmpl    $END, %edi
        jb      step
        incl    %esi
        testl   $63, %esi
        jnz     pass
        movb    $'.', %al
        ud2
        jmp     pass
wrong:
        movb    $'!', %al
        ud2
        jmp     wrong

second_task:
        movl    $1 << 22, %ecx
count:
        loop    count
        movb    $'w', %al
        ud2
        jmp     second_task

        .org    LENGTH

# In ROM, where a processor starts: to RAM with all of that.
        .code16
copy:
        cli
        cld
        movw    %cs, %ax
        movw    %ax, %ds
        xorw    %si, %si
        xorw    %ax, %ax
        movw    %ax, %es
        movw    $0x7c00, %di
        movw    $LENGTH, %cx
        rep movsb
        ljmp    $0, $0x7c00

        .org    0xfff0
        ljmp    $0xf000, $(copy - _start)
        .org    0x10000
