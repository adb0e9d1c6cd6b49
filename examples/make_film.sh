#!/bin/sh
# Makes film.mp4 beside this file, for the demo: long enough to scrub in, and small enough to ship with it.
# Needs ffmpeg with libx264 and the fonts of Debian's fonts-dejavu-core.
#
# 150 s in ten chapters, each with its own colour and chord; the clock shows where a scrub lands. Each second has about
# the same number of bytes, so that a position in the film is the same position in the file. Few frames a second keep the
# index (moov) small: it comes first, and the player waits for it. One encoder thread: with more, the result differs by a
# few bytes from run to run.
set -eu
cd "$(dirname "$0")"

seconds=150
chapter=15
sans="font=DejaVu Sans:fontcolor=white"
mono="font=DejaVu Sans Mono:fontcolor=white"

# A chord is three quiet sines, a few steps higher in each chapter; it fades in and out so that no change clicks.
root="st(0\,174.61*pow(2\,mod(5*floor(t/$chapter)\,12)/12))"
fade="0.06*min(1\,mod(t\,$chapter)*2)*min(1\,($chapter-mod(t\,$chapter))*2)"
sound="$root;$fade*(sin(2*PI*ld(0)*t)+sin(2*PI*ld(0)*1.25*t)+sin(2*PI*ld(0)*1.5*t))"

ffmpeg -hide_banner -loglevel warning -y \
  -f lavfi -i "gradients=s=640x360:r=12:d=$seconds:c0=0x12324a:c1=0x1f7f88:c2=0x3b2a5c:nb_colors=3:x0=0:y0=0:x1=640:y1=360:speed=0.006:seed=23" \
  -f lavfi -i "color=c=0xffc857:s=560x6:r=12:d=$seconds" \
  -f lavfi -i "aevalsrc='$sound':s=22050:d=$seconds" \
  -filter_complex "
    [0:v] hue=h='36*floor(t/$chapter)', drawbox=x=40:y=296:w=560:h=6:color=black@0.45:t=fill [ground];
    [1:v] format=yuva420p, geq=lum='p(X,Y)':cb='p(X,Y)':cr='p(X,Y)':a='255*lte(X\,560*T/$seconds)' [bar];
    [ground][bar] overlay=x=40:y=296,
      drawtext=$sans:fontsize=20:x=40:y=40:text='A film to scrub in',
      drawtext=$sans:fontsize=20:x=600-tw:y=40:text='chapter %{eif\:floor(t/$chapter)+1\:d} of 10',
      drawtext=$mono:fontsize=110:x=(w-tw)/2:y=118:text='%{pts\:gmtime\:0\:%M\\\\\:%S}',
      drawtext=$mono:fontsize=16:x=40:y=314:text='0\:00',
      drawtext=$mono:fontsize=16:x=226-tw/2:y=314:text='0\:50',
      drawtext=$mono:fontsize=16:x=413-tw/2:y=314:text='1\:40',
      drawtext=$mono:fontsize=16:x=600-tw:y=314:text='2\:30',
      format=yuv420p [picture]" \
  -map "[picture]" -map 2:a -t "$seconds" \
  -c:v libx264 -profile:v main -preset veryslow -tune animation -b:v 112k -minrate 112k -maxrate 112k -bufsize 112k \
  -x264-params nal-hrd=cbr -g 24 -keyint_min 24 -sc_threshold 0 -threads 1 \
  -c:a aac -b:a 24k -ac 1 \
  -map_metadata -1 -fflags +bitexact -flags:v +bitexact -flags:a +bitexact -movflags +faststart \
  film.mp4
