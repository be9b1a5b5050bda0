# A guest without an operating system: a boot sector that goes to protected mode
# and adds one to a counter in every page, in page order, at full speed, for
# ever. What its memory must look like at any instant: ordered_layout.h.
#
#   as --32 --defsym START=0x1000000 --defsym END=0x5000000 -o o.o ordered.S
#   ld -m elf_i386 -Ttext=0x7c00 --oformat binary -o boot.img o.o
#
# Writes 'R' to COM1 when the memory is filled, and '.' after every 16 passes.

        .set    COM1, 0x3f8

        .code16
        .globl  _start
_start:
        cli
        xorw    %ax, %ax
        movw    %ax, %ds
        inb     $0x92, %al              # the A20 gate, should it be closed
        orb     $2, %al
        andb    $0xfe, %al              # bit 0 would reset the machine
        outb    %al, $0x92
        lgdt    gdt_pointer
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmp    $8, $protected

        .code32
protected:
        movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss

        movl    $START, %edi            # fill: edi is the page
fill:
        movl    $0, (%edi)
        movl    %edi, 4(%edi)
        testl   $0x3000, %edi           # every fourth page gets noise
        jnz     next
        movl    %edi, %eax
        movl    $8, %ecx
noise:
        imull   $1664525, %eax, %eax
        addl    $1013904223, %eax
        movl    %eax, (%edi, %ecx)
        addl    $4, %ecx
        cmpl    $4096, %ecx
        jb      noise
next:
        addl    $4096, %edi
        cmpl    $END, %edi
        jb      fill

        movw    $COM1, %dx
        movb    $'R', %al
        outb    %al, %dx
        xorl    %ebx, %ebx
        movb    $'.', %al
pass:
        movl    $START, %edi
step:
        incl    (%edi)
        addl    $4096, %edi
        cmpl    $END, %edi
        jb      step
        incl    %ebx
        testb   $15, %bl
        jnz     pass
        outb    %al, %dx
        jmp     pass

        .balign 8
gdt:
        .quad   0
        .quad   0x00cf9a000000ffff      # code, 4 GiB
        .quad   0x00cf92000000ffff      # data, 4 GiB
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt

        .org    510
        .word   0xaa55
